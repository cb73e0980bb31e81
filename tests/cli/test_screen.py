"""Nothing from outside is markup or acts on the terminal, wherever it is printed."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from prune_export.cli import console, main
from prune_export.cli.engines import show_verification
from prune_export.cli.screen import Screen, in_encoding
from prune_export.display.escapes import escaped, json_escaped
from prune_export.errors import PlanError
from prune_export.verify.results import (
    Parity,
    Perplexity,
    Placed,
    Reload,
    Sparsity,
    Verification,
)

NASTY = "a[/x]b[bold c\x1b[2Jd\re\u202ef\x07g\x9b2Jh\u2066i\udcffj:smile:"
SHOWN = r"a[/x]b[bold c\x1b[2Jd\re\u202ef\x07g\x9b2Jh\u2066i\udcffj:smile:"
ACTING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class Stream(io.TextIOWrapper):
    """A log file of an encoding, and what was written to it."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def said(self) -> str:
        buffer: Any = self.buffer
        return str(buffer.getvalue().decode(self.encoding))


def flat(text: str) -> str:
    return "".join(text.split())


def test_every_character_that_acts_is_shown_as_an_escape() -> None:
    assert escaped(NASTY) == SHOWN
    assert escaped("plain é 漢字 🙂\nnext") == "plain é 漢字 🙂\nnext"
    quoted = json.dumps({NASTY: "\U000e0001"}, ensure_ascii=False)
    assert not ACTING.search(json_escaped(quoted))
    assert json.loads(json_escaped(quoted)) == {NASTY: "\U000e0001"}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1251", "utf-16"])
def test_all_kinds_of_printing_show_the_text_and_no_more(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    screen = Screen(width=200)
    table = Table(title=NASTY)
    table.add_column(NASTY)
    table.add_row(Text(NASTY))
    made = SimpleNamespace(__rich_console__=lambda *_: [Segment(NASTY)])
    for printed in (NASTY, screen.text(NASTY), Text(NASTY), table, made):
        screen.print(printed)
    screen.print(NASTY, markup=True, emoji=True)
    screen.put(NASTY)
    said = stream.said()
    assert not ACTING.search(said)
    assert said.count("a[/x]b[bold c") == 9
    assert said.count(SHOWN) >= 6


def test_signs_have_an_ascii_spelling_and_others_an_escape() -> None:
    assert in_encoding("1.2× – −3 … → é 漢", "ascii") == r"1.2x - -3 ... -> \xe9 \u6f22"
    assert in_encoding("é ×", "iso-8859-1") == "é x"
    assert in_encoding("1.2× é 漢", "UTF-8") == "1.2× é 漢"


def test_errors_progress_tables_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.show_error(PlanError(NASTY, NASTY, NASTY), as_json=False)
    console.show_error(PlanError(NASTY, NASTY, NASTY), as_json=True)
    console.table(NASTY, [NASTY, "b"], [(NASTY, NASTY)])
    console.pairs([(NASTY, NASTY)])
    for told in (console.Log(), console.Terminal()):
        told.say(NASTY)
        monkeypatch.setattr(console, "_LINE_EVERY_S", 0.0)
        with told.task(NASTY, 2) as task:
            task.note(NASTY)
            task.advance()
    monkeypatch.setattr(console.errors, "_force_terminal", True)
    terminal = console.Terminal()
    with terminal.task(NASTY, 2) as task:
        task.note(NASTY)
        terminal.bars.refresh()
        assert flat(SHOWN) in flat(str(terminal.bars.tasks[0].description))
    shown = capsys.readouterr()
    for text in (shown.out, re.sub("\x1b\\[[0-9;?]*[a-zA-Z]|\r", "", shown.err)):
        assert not ACTING.search(text), text
    assert flat(shown.out).count(flat(SHOWN)) >= 3
    assert flat(shown.err).count(flat(SHOWN)) >= 6


def call(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["prune-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def nasty(name: str) -> str:
    """What a file's name can hold."""
    return f"{name} [x] [bold \x1b[2J \r \u202e"


@pytest.mark.usefixtures("measured_here")
def test_a_whole_run_with_names_that_would_act(
    tiny_llama: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Description, recipe's name, model's path, data's path and name, out and store."""
    # As a path: `[/x]`, which closes what was never opened.
    (tmp_path / "m [").mkdir()
    model, root = tmp_path / "m [" / f"x] {nasty('model')}", tmp_path / nasty("data")
    model.symlink_to(tiny_llama, target_is_directory=True)
    root.symlink_to(corpus, target_is_directory=True)
    recipe = tmp_path / f"{nasty('recipe')}.yaml"
    recipe.write_text(
        "recipe: 1\n"
        'description: "Drop [/x] two [bold blocks \\e[2J \\r \\u202E"\n'
        "stages:\n  - prune: {method: deepest, remove: 2}\n"
        "verify: {parity: false, generation: false}\n",
        encoding="utf-8",
    )
    out, store = tmp_path / nasty("out"), tmp_path / nasty("store")
    where = ("--model", model, "--data-root", root, "--store", store, "--threads", 1)
    assert call("plan", recipe, *where) == 0
    assert call("run", recipe, *where, "--out", out) == 0
    assert call("run", recipe, *where, "--out", out, "--json") == 0
    assert call("store", "ls", "--store", store) == 0
    assert call("verify", tmp_path / nasty("missing")) == 2
    assert call("run", recipe, "--out", out, "--set", nasty("stages")) == 2
    assert call("recipes", nasty("recipe")) == 2
    assert call("methods", nasty("method")) == 2
    assert call("plan", recipe, nasty("--option")) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not ACTING.search(text), ACTING.search(text)
        assert r"\x1b[2J" in text
        assert "[bold" in text
    assert "[/x]" in shown.out

    page = (out / "report.html").read_text(encoding="utf-8")
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (page, card):
        assert not ACTING.search(text), ACTING.search(text)


def test_verification_inspection_and_plan_of_names_that_would_act(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Verification(
        Reload(False, NASTY, [NASTY], [NASTY], 1, 1.0),
        parity=[Parity(NASTY, NASTY, 1.0, 1.0, 1.0, 1, 1, True)],
        perplexity=[Perplexity(NASTY, 1.0, 1, 2, 1, [])],
        placement=[Placed(NASTY, NASTY, {NASTY: 7}, [NASTY])],
        sparsity=[Sparsity(NASTY, [], asked=True, proven=None, note=NASTY)],
        unverified={NASTY: NASTY},
    )
    show_verification(found)
    shown = capsys.readouterr().out
    assert not ACTING.search(shown)
    assert shown.count("a[/x]b[bold") >= 9


def test_only_the_console_writes() -> None:
    """New code gets all of this for free, if it does not print past it."""
    folder = Path(console.__file__).parent
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"typer\.echo|(?<![\w.])print\(|click\.echo", text), file
        if file.name not in ("console.py", "screen.py"):
            assert "rich.console" not in text, file
            assert "sys.stdout" not in text, file
