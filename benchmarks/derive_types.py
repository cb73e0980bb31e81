"""Derives a table for each model type of transformers that has none, and notes what came of it.

    python benchmarks/derive_types.py benchmarks/results/<date>-<machine>-derived-families.json

Each type is taken at its class's own default config, without weights; types named after the file
are added to what is there. docs/families_page.py makes docs/families.md of the result.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prune_export.arch.table import tables
from prune_export.deriving.instances import config_class, quietly
from prune_export.deriving.making import derive
from prune_export.errors import UnsupportedArch
from prune_export.machine import describe

SECONDS = 60
"""A type that takes longer is given up."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took over {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def of_type(model_type: str) -> dict[str, Any]:
    began = time.process_time()
    found: dict[str, Any] = {"model_type": model_type}
    try:
        with limited(SECONDS), quietly():
            derived = derive(config_class(model_type)().to_dict())
        found["came"] = "disproved" if derived.failed else "proven"
        found["checks"] = [[one.what, one.word, one.found] for one in derived.checks]
        found["untraceable"] = derived.table.untraceable or (
            "its blocks give tuples" if derived.table.tuple_blocks else ""
        )
    except UnsupportedArch as error:
        found |= {"came": "refused", "why": error.problem}
    except Exception as error:  # whatever a class does on a config of its own
        found |= {
            "came": "failed",
            "why": f"{type(error).__name__}: {' '.join(str(error).split())}",
        }
    found["processor_seconds"] = round(time.process_time() - began, 2)
    return found


def main() -> None:
    out = Path(sys.argv[1])
    wanted = sys.argv[2:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - tables().keys())
    types = []
    if out.is_file():  # begun earlier: what is asked for is made again, the rest is kept
        kept = json.loads(out.read_text(encoding="utf-8"))["types"]
        types = [one for one in kept if one["model_type"] not in wanted]
    for model_type in wanted:
        types.append(of_type(model_type))
        print(model_type, types[-1]["came"], types[-1].get("why", "")[:100], flush=True)
    report = {
        "command": "benchmarks/derive_types.py",
        "machine": describe(),
        "versions": {name: version(name) for name in ("transformers", "torch", "prune-export")},
        "types": sorted(types, key=lambda one: one["model_type"]),
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
