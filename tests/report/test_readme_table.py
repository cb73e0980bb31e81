"""The README's generated section: written, checked, and refused where it cannot be."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.report.variants import made

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "readme_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def place(tmp_path: Path) -> list[str]:
    """Arguments for a README, a report and a picture in a directory of their own."""
    text = "# Title\n\n<!-- demo:begin -->\nold 1.99×\n<!-- demo:end -->\n\nThe end.\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    report = tmp_path / "benchmarks" / "results" / "run.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps(made("full")), encoding="utf-8")
    image = tmp_path / "docs" / "img" / "demo.png"
    return [str(report), "--readme", str(tmp_path / "README.md"), "--image", str(image)]


def test_writes_then_agrees_then_notices(
    script: ModuleType, place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    assert script.main([*place, "--check"]) == 1
    assert "old 1.99×" in readme.read_text(encoding="utf-8"), "a check writes nothing"
    assert script.main(place) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- demo:begin -->\n")
    assert text.endswith("<!-- demo:end -->\n\nThe end.\n")
    assert "1.99×" not in text
    assert "| decode, onnx | 23.6 tok/s | 27.4 tok/s | 1.17× faster (1.16–1.17) |" in text
    assert "](docs/img/demo.png)" in text
    assert "[benchmarks/results/run.json](benchmarks/results/run.json)" in text
    assert script.main([*place, "--check"]) == 0
    assert script.main(place) == 0
    assert readme.read_text(encoding="utf-8") == text
    capsys.readouterr()

    readme.write_text(text.replace("1.17×", "1.19×"), encoding="utf-8")
    assert script.main([*place, "--check"]) == 1
    assert "README.md is not what" in capsys.readouterr().out
    readme.write_text(text, encoding="utf-8")

    report = made("full")
    report["stages"][0]["log"]["distance_map"][0][1] = 0.123
    (tmp_path / "benchmarks" / "results" / "run.json").write_text(json.dumps(report))
    assert script.main([*place, "--check"]) == 1
    out = capsys.readouterr().out
    assert "demo.png is not what" in out
    assert "README.md is not" not in out


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- demo:end --><!-- demo:begin -->",
        "<!-- demo:begin -->" * 2 + "<!-- demo:end -->",
    ],
)
def test_a_readme_without_its_markers(
    script: ModuleType, place: list[str], tmp_path: Path, text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert script.main(place) == 2
    assert "expected one `<!-- demo:begin -->`" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text


def test_a_report_that_is_none_or_shows_nothing(
    script: ModuleType, place: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Path(place[0])
    report.write_text(json.dumps(made("least")), encoding="utf-8")
    assert script.main(place) == 2
    assert "nothing to draw" in capsys.readouterr().err
    report.write_text("{", encoding="utf-8")
    assert script.main(place) == 2
    assert "is not JSON" in capsys.readouterr().err
