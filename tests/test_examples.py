"""The examples run as they stand, on a tiny random model; none is left out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("measured_here")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def main_of(name: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., None] = module.main
    return main


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared texts, as JSON lines, which is what `make demo` leaves."""
    folder = tmp_path_factory.mktemp("data")
    for source in corpus.iterdir():
        lines = source.read_text(encoding="utf-8").splitlines()
        if source.suffix == ".txt":
            lines = [json.dumps({"text": line}) for line in lines]
        (folder / f"{source.stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_no_example_is_left_out() -> None:
    made = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")}
    assert made == {
        "choose_by_itself.py", "first_steps.ipynb", "look_at_a_result.py", "prune_and_measure.py",
    }  # fmt: skip
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in made)


@pytest.mark.slow
def test_a_result_is_made_measured_and_looked_at(
    tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    main_of("prune_and_measure")(str(tiny_llama), str(data), out)
    said = capsys.readouterr().out
    assert "6 → 4 blocks" in said
    assert said.count("perplexity of ") == 2
    main_of("look_at_a_result")(out)
    said = capsys.readouterr().out
    assert "made from tiny-llama" in said
    assert "by block_influence" in said
    assert "changed since: nothing" in said


def test_what_is_no_result_is_told(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("look_at_a_result")(str(tiny_llama))
    assert "no lock" in capsys.readouterr().out


@pytest.mark.slow
def test_methods_compete(
    tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of("choose_by_itself")(str(tiny_llama), str(data), str(tmp_path / "out"))
    said = capsys.readouterr().out
    for method in ("block_influence", "structured_wanda"):
        assert method in said
    assert said.count("← chosen") == 1


@pytest.mark.slow
def test_the_notebook_runs_cell_by_cell(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    for name, value in (("MODEL", tiny_llama), ("DATA", data), ("OUT", tmp_path / "out")):
        monkeypatch.setenv(name, str(value))
    names: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before the notebook is committed"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["made"].model.config.num_hidden_layers == 4
    assert names["made"].provenance.changed() == ()


def test_scripts_say_how_they_are_called() -> None:
    for file in EXAMPLES.glob("*.py"):
        assert f"python examples/{file.name} " in file.read_text(encoding="utf-8").splitlines()[0]
