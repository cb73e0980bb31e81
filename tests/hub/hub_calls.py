"""Makes calls given as JSON on standard input, in a process that is not offline; prints outcomes.

Run by `test_publishing.py` with HF_ENDPOINT at the fake Hub. Each call has `function`, `arguments`,
and may have `environment` (set for the call, null removes). What this package and
huggingface_hub log goes to standard error, so that a test sees whatever a user could see.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from prune_export.errors import PruneExportError
from prune_export.hub.publishing import publish
from prune_export.hub.recipes import publish_recipes, search
from prune_export.progress import Silent
from prune_export.recipe import Recipe
from prune_export.recipe.fetching import fetches
from prune_export.recipe.remote import fetched


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def ended(arguments: list[str]) -> dict[str, Any]:
    """How a command ends, and what it says on standard error."""
    from contextlib import redirect_stderr
    from io import StringIO

    from prune_export.cli import console, main

    sys.argv, told = ["prune-export", *arguments], StringIO()
    console.errors.file = told
    with redirect_stderr(told):
        try:
            main()
        except SystemExit as end:
            return {"status": end.code, "told": told.getvalue()}
    return {"status": 0, "told": told.getvalue()}


def again(target: str, work: str, model: str) -> dict[str, Any]:
    """Reproduces a published result; engines answer from threads of this process."""
    import pytest

    from prune_export.execution import Options
    from prune_export.machine import Machine
    from prune_export.results.reproduction import places, reproduce
    from tests.measured_here import install

    machine = Machine.detect(device="cpu", threads=1)
    chosen = places(Path(work), Options(Path(work), Path(work), machine))
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return reproduce(target, chosen, model=model).to_json()


def outcome(call: dict[str, Any]) -> dict[str, Any]:
    lines = Lines()
    arguments = dict(call["arguments"])
    try:
        if call["function"] == "fetched":
            path = fetched(**arguments)
            return {"path": str(path), "text": path.read_text(encoding="utf-8")}
        if call["function"] == "reproduce":
            return again(**arguments)
        if call["function"] == "search":
            return {"found": [dataclasses.asdict(one) for one in search(**arguments)]}
        if call["function"] == "load":
            recipe = Recipe.load(**arguments)
            return {"stages": [one.name for one in recipe.stages], "fetches": fetches(recipe)}
        if call["function"] == "cli":
            return ended(**arguments)
        directory = Path(arguments.pop("directory"))
        if call["function"] == "publish_recipes":
            return dataclasses.asdict(publish_recipes(directory, **arguments))
        return dataclasses.asdict(publish(directory, progress=lines, **arguments)) | {
            "said": lines.said
        }
    except PruneExportError as error:
        return {
            "error": type(error).__name__,
            "where": error.where,
            "problem": error.problem,
            "fix": error.fix,
            "shown": "".join(traceback.format_exception(error)),
            "chained": error.__cause__ is not None or error.__context__ is not None,
        }


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for name in ("huggingface_hub", "prune_export"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    outcomes = []
    for call in json.load(sys.stdin):
        before = dict(os.environ)
        for name, value in call.get("environment", {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        outcomes.append(outcome(call))
        os.environ.clear()
        os.environ.update(before)
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
