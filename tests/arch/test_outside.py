"""Tables from outside: of a package, of a directory; the same errors as for ours."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from prune_export.arch import outside
from prune_export.arch.table import table_for, tables
from prune_export.errors import UnsupportedArch

LLAMA = files("prune_export.arch").joinpath("families/llama.yaml").read_text(encoding="utf-8")
OTHER = LLAMA.replace("family: llama", "family: other").replace("[llama]", "[iquestcoder]")
DERIVED = "derived: {transformers: '%s', proven: [cache (8 tokens)]}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(outside.VARIABLE, "")
    made = tmp_path / "families"
    made.mkdir()
    return made


def test_a_table_of_a_directory_is_known(folder: Path) -> None:
    (folder / "other.yaml").write_text(OTHER)
    (folder / "_notes.yaml").write_text("not a table")
    assert "iquestcoder" not in tables()
    outside.use(folder)
    outside.use(folder)
    assert outside.directories() == (folder.resolve(),)
    assert table_for("iquestcoder").family == "other"
    assert table_for("llama").family == "llama"


def test_a_malformed_table_is_named(folder: Path) -> None:
    (folder / "other.yaml").write_text(OTHER.replace("vocab residual}", "vocab residaul}", 1))
    outside.use(folder)
    with pytest.raises(UnsupportedArch, match="unknown axes") as caught:
        tables()
    assert caught.value.where.startswith(f"{folder.resolve()}/other.yaml")


def test_no_model_type_is_described_twice(folder: Path) -> None:
    (folder / "mine.yaml").write_text(LLAMA)
    outside.use(folder)
    with pytest.raises(UnsupportedArch, match="described already, by prune_export itself"):
        tables()


@pytest.mark.parametrize(
    ("raw", "problem"),
    [(b"\xff\xfe", "not UTF-8"), (b"#" * (1 << 20) + b"#", "is no table")],
)
def test_what_is_no_text_is_refused(folder: Path, raw: bytes, problem: str) -> None:
    (folder / "other.yaml").write_bytes(raw)
    outside.use(folder)
    with pytest.raises(UnsupportedArch, match=problem):
        tables()


def test_what_is_no_directory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedArch, match="is no directory"):
        outside.use(folder / "missing")
    monkeypatch.setenv(outside.VARIABLE, str(folder / "missing"))
    with pytest.raises(UnsupportedArch, match="--families names it"):
        tables()


def test_a_derived_table_gives_way_and_holds_for_one_transformers(folder: Path) -> None:
    import transformers

    (folder / "old.yaml").write_text(OTHER + DERIVED % "4.0.0")
    outside.use(folder)
    assert "iquestcoder" not in tables()
    (folder / "again").mkdir()
    (folder / "again" / "new.yaml").write_text(OTHER + DERIVED % transformers.__version__)
    outside.use(folder / "again")
    assert table_for("iquestcoder").derived is not None
    (folder / "by_hand").mkdir()
    (folder / "by_hand" / "own.yaml").write_text(OTHER)
    outside.use(folder / "by_hand")
    assert table_for("iquestcoder").derived is None


def test_of_several_derived_tables_the_one_true_of_the_config_is_taken(folder: Path) -> None:
    import transformers

    mark = DERIVED % transformers.__version__
    for name, act in (("a", "[silu]"), ("b", "[relu]")):
        start, _, rest = (OTHER + mark).partition("hidden_act: [")
        (folder / f"{name}.yaml").write_text(
            start.replace("family: other", f"family: {name}") + f"hidden_act: {act}"
            + rest.partition("]")[2]
        )  # fmt: skip
    outside.use(folder)
    assert table_for("iquestcoder", {"hidden_act": "relu"}).family == "b"
    assert table_for("iquestcoder", {"hidden_act": "silu"}).family == "a"
