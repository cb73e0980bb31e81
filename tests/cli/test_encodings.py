"""Every command where terminal and logs are not UTF-8: a run must not end at a sign."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A terminal that takes ASCII only, as cron and small containers have it."""

Others = Callable[..., tuple[str, str]]

RECIPE = """\
recipe: 1
description: "Drop two blocks × – − … → é 漢"
data: {e: {files: [text.txt], samples: 2, length: 32}}
stages:
  - prune: {method: deepest, remove: 2}
export: [onnx]
verify: {parity: false, generation: false, quality: {perplexity: e}}
"""


def command(*arguments: object, status: int = 0, **variables: str) -> tuple[str, str]:
    """What a command says on both streams, in a process with its own locale."""
    done = subprocess.run(
        [sys.executable, "-m", "prune_export", *map(str, arguments)],
        capture_output=True, env={**os.environ, **(variables or PLAIN)}, check=False,
    )  # fmt: skip
    return checked(done.returncode, done.stdout, done.stderr, status)


def checked(found: int, out: bytes, err: bytes, status: int) -> tuple[str, str]:
    shown, told = out.decode("ascii"), err.decode("ascii")
    assert found == status, told
    assert "Traceback" not in told
    assert "Error:" not in told
    return shown, told


@pytest.fixture(scope="module")
def others() -> Iterator[Callable[..., tuple[str, str]]]:
    """As `command`, one after the other in one process of that locale."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.commands"], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env={**os.environ, **PLAIN, "PYTHONPATH": paths},
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout

        def ask(*arguments: object, status: int = 0) -> tuple[str, str]:
            asked = [str(argument).encode().hex() for argument in arguments]
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            found, out, err = json.loads(process.stdout.readline())
            return checked(found, bytes.fromhex(out), bytes.fromhex(err), status)

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, corpus: Path) -> Path:
    """A directory with a recipe and a model, whose names and its own are outside of ASCII."""
    root = tmp_path_factory.mktemp("encodings") / "place"
    root.mkdir()
    (root / "modele").symlink_to(tiny_llama, target_is_directory=True)
    (root / "text.txt").write_bytes((corpus / "evaluation.txt").read_bytes())
    (root / "régime.yaml").write_text(RECIPE, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def made(place: Path) -> tuple[str, str]:
    """What a whole run says; its result is `sortie`."""
    where = ("--model", place / "modele", "--store", place / "magasin", "--threads", 1)
    return command("run", place / "régime.yaml", *where, "--out", place / "sortie")


@pytest.mark.slow
def test_a_whole_run_in_ascii(place: Path, made: tuple[str, str], others: Others) -> None:
    out, store = place / "sortie", place / "magasin"
    where = ("--model", place / "modele", "--store", store, "--threads", 1)
    shown, told = made
    assert "Drop two blocks x - - ... ->" in shown
    assert "prune: deepest" in told
    assert (out / "model.safetensors").is_file()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["recipe"]["description"] == "Drop two blocks × – − … → é 漢"
    again = json.loads(others("run", place / "régime.yaml", *where, "--out", out, "--json")[0])
    assert again["result"] == report["result"]
    assert "artifacts" in others("store", "ls", "--store", store)[0]


@pytest.mark.slow
def test_commands_that_read_little_in_ascii(place: Path, others: Others) -> None:
    where = ("--model", place / "modele", "--store", place / "magasin", "--threads", 1)
    shown, _ = others("plan", place / "régime.yaml", *where)
    assert "6 -> 4" in shown
    assert json.loads(others("plan", place / "régime.yaml", *where, "--json")[0])
    _, told = others("plan", place / "même.yaml", status=2)
    assert "neither a file nor a bundled recipe" in told
    for arguments in (("methods",), ("methods", "gblm"), ("recipes",), ("recipes", "laco"), ()):
        others(*arguments, status=0 if arguments else 2)
    for arguments in (("schema",), ("run", "--help")):
        others(*arguments)
    _, told = others("store", "gc", "--store", place / "rien", status=2)
    assert "is no store" in told


@pytest.mark.slow
def test_measuring_commands_in_ascii(place: Path, made: tuple[str, str], others: Others) -> None:
    data = ("--data", place / "text.txt", "--threads", 1, "--store", place / "magasin")
    picture = place / "carte.png"
    few = ("--samples", 2, "--length", 32)
    shown, _ = others("inspect", place / "modele", *data, *few, "--out", picture)
    assert "distance (pi)" in shown
    assert picture.is_file()
    others("verify", place / "modele", *data, *few)
    short = ("--prompt", 4, "--new", 2, "--minutes", 0.05)
    engine = place / "moteur"
    others("export", place / "modele", "--to", "onnx", "--out", engine, *data[2:])
    result = place / "sortie"
    others("compare", result, result, "--engine", "onnx", *data, *short)


@pytest.mark.slow
def test_other_encodings(place: Path) -> None:
    where = ("--model", place / "modele", "--store", place / "magasin", "--threads", 1)
    shown, _ = command("plan", place / "régime.yaml", *where, PYTHONIOENCODING="ascii")
    assert "6 -> 4" in shown
