"""Times an engine's steps under several settings, as a program: huge pages are asked for at start.

    python -m prune_export.exporters._shared.tuning_child REQUEST.json

The request holds the engine's `path`, its `exporter` with `keys`, the `settings`, and how much to
do: `prompt`, `new` and `rounds`. The last line printed is JSON: for each setting the median seconds
of a decoding step and of the prompt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from prune_export import registry
from prune_export.machine import Machine


def main(request: Mapping[str, Any]) -> list[list[float]]:
    """Times each setting in turn, round by round; gives [decode, prefill] of each in seconds."""
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in request["settings"]]
    prompt, new = int(request["prompt"]), int(request["new"])
    ids = np.arange(1, prompt + new + 1, dtype=np.int64)[None] % int(request["vocab"])
    for _ in range(int(request["rounds"])):
        for setting, (steps, prompts) in zip(request["settings"], found, strict=True):
            machine = Machine("cpu", 0, 0, int(setting["threads"]))
            keys = {**request["keys"], **setting.get("keys", {})}
            entry = registry.find("exporters", request["exporter"])(**keys)
            path = Path(request["path"])
            # One at a time is open: an engine may be most of the memory.
            with entry.opened(path, machine, spinning=bool(setting["spinning"])) as runner:
                for warm in (True, False):
                    runner.reset()
                    first = runner.step(ids[:, :prompt])[1]
                    each = [
                        runner.step(ids[:, at : at + 1])[1] for at in range(prompt, prompt + new)
                    ]
                    if not warm:
                        prompts.append(first)
                        steps += each
    return [[median(steps), median(prompts)] for steps, prompts in found]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
