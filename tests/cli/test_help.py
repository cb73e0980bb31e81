"""`--help` of every command: it fits, types have names, examples can be copied."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import typer

from prune_export.cli import main
from prune_export.cli.commands import app

GROUP = typer.main.get_command(app)
COMMANDS = [
    (),
    *((name,) for name in GROUP.commands),  # type: ignore[attr-defined]
    *(("store", name) for name in ("ls", "gc")),
]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_and_names_its_types(
    command: tuple[str, ...],
    width: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "argv", ["prune-export", *command, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    assert not re.search(r"<\w|…|list\[", shown)
    assert "[OPTIONS]" in shown.splitlines()[0]
    # An example, put together again, is a command that is known, with every word of it.
    examples = re.findall(r"^  (prune-export (?:.*\\\n)*.*)$", shown, re.MULTILINE)
    documented = re.findall(r"^ *(prune-export .*)$", _docstring(command), re.MULTILINE)
    joined = [one.replace("\\\n", " ") for one in examples]
    assert [shlex.split(one) for one in joined] == [shlex.split(one) for one in documented]


def _docstring(command: tuple[str, ...]) -> str:
    found = GROUP
    for name in command:
        found = found.commands[name]  # type: ignore[attr-defined]
    return found.help or ""


def test_words_that_are_not_understood_are_three_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["run"], ["plna"], ["plan", "demo", "--thread", "x"], ["plan", "a", "b"]):
        monkeypatch.setattr(sys, "argv", ["prune-export", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3
        assert lines[0].startswith("error  prune-export")
        assert "--help" in lines[2]
