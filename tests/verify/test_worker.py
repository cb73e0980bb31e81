import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.worker import serve


def answers(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    out = io.StringIO()
    serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def opening(engine: Engine, machine: Machine) -> dict[str, Any]:
    arguments = {"engine": engine.to_json(), "machine": asdict(machine)}
    return {"command": "open", "arguments": arguments}


def test_opens_and_scores(tiny: Path, machine: Machine, ids: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids)
    scoring = {"command": "losses", "arguments": {"ids_file": str(tmp_path / "ids.npy")}}
    opened, *advances, scored = answers(opening(Engine.pytorch(tiny), machine), scoring)
    assert opened == {"result": 256}
    assert advances == [{"advance": 1}] * 5
    assert len(scored["result"]) == 5


def test_goes_on_after_an_error(tiny: Path, machine: Machine) -> None:
    empty = {"command": "continuations", "arguments": {"prompts": [[]], "new": 3}}
    good = {"command": "continuations", "arguments": {"prompts": [[1]], "new": 1}}
    _, refused, said = answers(opening(Engine.pytorch(tiny), machine), empty, good)
    assert refused["error"]["kind"] == "VerifyError"
    assert "empty prompt" in refused["error"]["lines"][1]
    assert len(said["result"][0]) == 1


def test_unexpected_errors_carry_their_traceback(tmp_path: Path, machine: Machine) -> None:
    [failed] = answers(opening(Engine.pytorch(tmp_path / "absent"), machine))
    assert failed["error"]["kind"] == ""
    assert "Traceback" in failed["error"]["lines"][0]
