"""`optimum-cli prune` by the real optimum-cli: help, a command, and its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("optimum.commands.optimum_cli") is None:
    pytest.skip("optimum is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
DISTRIBUTION = ROOT / "integrations" / "optimum"


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(DISTRIBUTION), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_optimum_finds_it_and_shows_our_help() -> None:
    done = call("prune", "--help")
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout


def test_arguments_go_through_and_the_status_comes_back(tmp_path: Path) -> None:
    refused = call("prune", "plan", tmp_path / "none.yaml", "--model", tmp_path)
    assert refused.returncode == 2
    assert "none.yaml" in refused.stderr


def test_its_folders_stay_a_namespace() -> None:
    files = [one.relative_to(DISTRIBUTION).as_posix() for one in DISTRIBUTION.rglob("*.py")]
    assert files == ["optimum/commands/register/prune_export_commands.py"]
