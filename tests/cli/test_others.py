"""Commands of other packages: found by entry point, and harmless where they are broken."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from prune_export.cli.others import commands_of_others
from prune_export.errors import PlanError

ROOT = Path(__file__).parents[2]


def test_a_command_of_another_package_is_found_and_a_broken_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_commands.py").write_text("def hello() -> None:\n    '''Greets.'''\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[prune_export.commands]\nhello = their_commands:hello\nbad = their_commands:missing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {one.name: one.command for one in commands_of_others()}
    assert found["hello"].__doc__ == "Greets."
    with pytest.raises(PlanError, match=r"their_commands:missing of theirs cannot be imported"):
        found["bad"]()


@pytest.mark.parametrize(
    ("name", "takes"), [("serve", "directory"), ("gguf", "checkpoint"), ("lm-eval", "directory")]
)
def test_ours_are_declared_and_can_be_imported_without_their_extras(name: str, takes: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["prune_export.commands"][name].partition(":")
    command = getattr(importlib.import_module(module), function)
    assert takes in inspect.signature(command).parameters


def test_finding_them_brings_nothing_heavy() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = project["entry-points"]["prune_export.commands"].values()
    modules = ", ".join(entry.partition(":")[0] for entry in entries)
    code = f"import sys, {modules}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    folders = [str(ROOT), *map(str, (ROOT / "integrations").iterdir())]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_package_never_imports_an_integration() -> None:
    for file in (ROOT / "prune_export").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "prune_export_server" not in text, file
        assert "prune_export_llama_cpp" not in text, file
        assert "prune_export_lm_eval" not in text, file
