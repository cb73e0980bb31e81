"""The process that times an ONNX engine is small: it starts without torch and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from prune_export.machine import Machine
from prune_export.verify.engine import Engine

MACHINE = Machine(device="cpu", ram_bytes=4 << 30, gpu_bytes=0, threads=1)

TIMED = """\
import sys
from prune_export.verify.worker import main
main()
heavy = {"torch", "transformers", "matplotlib"} & sys.modules.keys()
print(sorted(heavy), file=sys.stderr)
"""


@pytest.mark.slow
def test_an_engine_is_opened_and_timed_without_torch(tiny_graph: Path) -> None:
    engine = Engine("onnx", tiny_graph.parent, trusted=True)
    opening = {"engine": engine.to_json(), "machine": asdict(MACHINE)}
    requests = [
        {"command": "open", "arguments": opening},
        {"command": "time", "arguments": {"ids": [[3, 4, 5, 6]], "prompt": 2}},
    ]
    done = subprocess.run(
        [sys.executable, "-c", TIMED], input="".join(json.dumps(one) + "\n" for one in requests),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened, timed = (json.loads(line) for line in done.stdout.splitlines())
    assert opened["result"] > 0
    assert len(timed["result"]) == 2
    assert done.stderr.splitlines()[-1] == "[]"
