"""`hf prune` by the real `hf`, and an assistant's instructions that name only what there is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

pytest.importorskip("huggingface_hub.cli.extensions")

from prune_export.cli.commands import app
from prune_export.recipe import Recipe

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "integrations" / "hf"
SKILL = FOLDER / ".agents" / "skills" / "prune-export" / "SKILL.md"
SCRIPT = FOLDER / "hf-prune"
WITH_GITHUB = Path(__file__).with_name("with_github.py")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="hf takes no scripts on Windows")


def program(folder: Path, text: str, name: str = "prune-export") -> Path:
    """A program of a few lines of shell."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def call(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    return subprocess.run(
        list(map(str, command)), env=keep | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_hf_installs_it_lists_it_and_runs_it(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    program(programs, f'exec {shlex.quote(sys.executable)} -m prune_export "$@"')
    home = {
        "HOME": str(tmp_path), "PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "100",
    }  # fmt: skip
    hf = [sys.executable, WITH_GITHUB, FOLDER]
    done = call(*hf, "extensions", "install", "me/hf-prune", **home)
    assert done.returncode == 0, done.stderr
    placed = tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-prune" / "hf-prune"
    assert placed.read_bytes() == SCRIPT.read_bytes()
    listed = call(*hf, "extensions", "list", "--no-truncate", **home)
    assert "declarative recipe" in " ".join(listed.stdout.split()), listed
    # From here on the command as it is installed.
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf"]
    shown = call(*hf, "prune", "--help", **home)
    assert shown.returncode == 0, shown.stderr
    assert "reproduce" in shown.stdout
    refused = call(*hf, "prune", "recipes", "no-such-recipe", **home)
    assert refused.returncode == 2
    assert "is not a bundled recipe" in refused.stderr


def test_arguments_and_status_are_handed_over_as_they_are(tmp_path: Path) -> None:
    here = tmp_path / "with space"
    program(here, 'for one in "$@"; do echo "<$one>"; done; echo "${0%/*}"; exit 7')
    given = ("a b", "", "*", "$HOME", "--x=1'2\"3", "-o")
    said = "".join(f"<{one}>\n" for one in given) + f"{here}\n"
    for environment in (
        {"PATH": str(here)},
        {"PATH": "", "PRUNE_EXPORT": str(here / "prune-export")},
    ):
        done = call(SCRIPT, *given, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (7, said, "")


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    program(tmp_path / "venv" / "bin", "echo venv")
    program(tmp_path / "path", "echo path")
    program(tmp_path / "said", "echo said")
    venv, path = str(tmp_path / "venv"), str(tmp_path / "path")
    assert call(SCRIPT, PATH=path, VIRTUAL_ENV=venv).stdout == "path\n"
    assert call(SCRIPT, PATH=str(tmp_path), VIRTUAL_ENV=venv).stdout == "venv\n"
    said = str(tmp_path / "said" / "prune-export")
    assert call(SCRIPT, PATH=path, VIRTUAL_ENV=venv, PRUNE_EXPORT=said).stdout == "said\n"
    for missing in (
        {"PATH": str(tmp_path)},
        {"PATH": "", "PRUNE_EXPORT": str(tmp_path)},
        {"PATH": "", "PRUNE_EXPORT": str(tmp_path / "nothing")},
    ):
        done = call(SCRIPT, "run", **missing)
        assert done.returncode == 2, missing
        where, problem, fix = done.stderr.splitlines()
        assert where == "error  hf prune"
        assert "not on the PATH" in problem
        assert 'pip install "prune-export[all]"' in fix


def test_the_skill_says_what_it_is_for() -> None:
    _, front, text = SKILL.read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(front)
    assert about.keys() == {"name", "description"}
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", about["name"])
    assert about["name"] == SKILL.parent.name
    assert 20 < len(about["description"]) <= 1024
    assert len(text.splitlines()) < 500


def test_the_skill_names_only_commands_and_options_that_there_are() -> None:
    group = typer.main.get_command(app)
    blocks = re.findall(r"```sh\n(.*?)```", SKILL.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert len(lines) > 12
    for line in lines:
        name, command, *given = shlex.split(line)
        assert name == "prune-export"
        found = group.commands[command]  # type: ignore[attr-defined]
        known = {option for one in found.params for option in one.opts}
        assert {one for one in given if one.startswith("-")} <= known, line


def test_the_skills_recipe_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", SKILL.read_text(encoding="utf-8"), re.DOTALL)
    recipe = Recipe.parse(text)
    assert [stage.kind for stage in recipe.stages] == ["prune", "heal"]
