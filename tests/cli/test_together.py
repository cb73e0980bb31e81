"""The command under torchrun: the leader's output and files, the others' silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = """\
recipe: 1
data:
  healing: {files: [healing.jsonl], samples: 12, length: 32}
stages:
  - prune: {method: deepest, remove: 2}
  - heal: {method: full, steps: 3, batch: 4, micro_batch: 1, learning_rate: 1.0e-3, compute_dtype: float32,
           objective: {distill: {cache: 8}}}
verify: {generation: false}
"""  # noqa: E501


def run(before: list[str], out: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, *before, "-m", "prune_export", "run", *arguments, "--threads", "1",
        "--out", str(out), "--store", f"{out}-store",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_under_torchrun_is_that_of_one_process(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    (corpus / "together.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = [str(corpus / "together.yaml"), "--model", str(tiny_llama)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = run(torchrun, tmp_path / "both", [*arguments, "--json"])
    assert both.returncode == 0, both.stderr
    alone = run([], tmp_path / "alone", [*arguments, "--json"])
    assert alone.returncode == 0, alone.stderr
    # One process speaks, and what it wrote is one result.
    report = json.loads(both.stdout)
    assert [stage["name"] for stage in report["stages"]] == ["deepest", "full"]
    ours, theirs = (load_file(tmp_path / one / "model.safetensors") for one in ("alone", "both"))
    source = load_file(tiny_llama / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    moved = float((ours[name] - source[name]).abs().max())
    assert moved > 1e-4
    assert all(float((ours[key] - theirs[key]).abs().max()) < 1e-3 * moved for key in ours)
    other = json.loads((tmp_path / "alone" / "report.json").read_text(encoding="utf-8"))
    assert [stage["id"] for stage in report["stages"]] == [stage["id"] for stage in other["stages"]]


@pytest.mark.slow
def test_what_the_leader_refuses_ends_all(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    (corpus / "impossible.yaml").write_text(RECIPE.replace("remove: 2", "remove: 6"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(corpus / "impossible.yaml"), "--model", str(tiny_llama)]
    done = run(torchrun, tmp_path / "out", arguments)
    assert done.returncode != 0
    assert done.stderr.count("6 of 6 blocks would be removed") == 1
    assert not (tmp_path / "out").exists()
