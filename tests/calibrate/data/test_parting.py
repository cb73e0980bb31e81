"""Parts of one text never overlap, hold about their share, and are the same in every run."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from prune_export.calibrate.data.documents import Text, column_of
from prune_export.calibrate.data.parting import local_texts, part_sizes, spans, texts_of_part
from prune_export.errors import PlanError
from prune_export.recipe.sources import LocalText, Part

SHARES = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.0))


def parts(seed: int = 0) -> list[Part]:
    return [Part(start=start, stop=stop, seed=seed) for start, stop in SHARES]


def reader(*texts: str) -> Callable[[], list[Text]]:
    return lambda: list(texts)


def test_documents_lie_in_one_part_each() -> None:
    texts = [f"document {number} " + "word " * (number % 7) for number in range(500)]
    texts += texts[:20]  # equal documents stay together
    found = [set(texts_of_part(reader(*texts), part)) for part in parts()]
    assert set.union(*found) == set(texts)
    assert sum(map(len, found)) == 500
    sizes = part_sizes(reader(*texts), parts())
    for (start, stop), size in zip(SHARES, sizes, strict=True):
        assert size / sum(map(len, texts)) == pytest.approx(stop - start, abs=0.03)
    assert found == [set(texts_of_part(reader(*texts), part)) for part in parts()]
    assert found[0] != set(texts_of_part(reader(*texts), parts(seed=1)[0]))


def test_a_long_text_is_cut_into_contiguous_spans() -> None:
    paragraphs = [f"Absatz {number}: " + "schöne Wörter " * 20 for number in range(400)]
    text = "\n\n".join(paragraphs)
    cut = list(spans(text, 4000))
    assert "".join(cut) == text
    assert all(2000 < len(one) <= 4000 for one in cut[:-1])
    assert all(one.endswith("\n\n") for one in cut[:-1])
    found = [list(texts_of_part(reader(text), part)) for part in parts()]
    assert sorted(chain.from_iterable(found)) == sorted(spans(text, len(text) // 50))
    assert all(one in text for texts in found for one in texts)
    assert all(found)
    assert "".join(spans("x" * 999, 100)) == "x" * 999


def test_formats_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a b.md").write_text("# Überschrift", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([{"body": "one"}, {"body": "two"}]))
    (tmp_path / "d.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "e.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "f.json").write_text("[{")
    (tmp_path / "g.jsonl").write_text('{"messages": [], "id": "x"}\n')
    (tmp_path / "h.jsonl").write_text('{"title": "t", "body": "b"}\n')

    def read(name: str, column: str = "text") -> list[Text]:
        return list(local_texts([tmp_path / name], LocalText(files=(name,), column=column)))

    assert read("a b.md") == ["# Überschrift"]
    assert read("c.json", column_of([tmp_path / "c.json"])) == ["one", "two"]
    assert read("d.json", column_of([tmp_path / "d.json"])) == ["one", "two"]
    assert read("e.json") == ["one", "two"]
    with pytest.raises(PlanError, match="is not JSON"):
        read("f.json")
    assert column_of([tmp_path / "a b.md"]) == "text"
    assert column_of([tmp_path / "a b.md", tmp_path / "g.jsonl"]) == "messages"
    with pytest.raises(PlanError, match="2 fields that could be the text: title, body"):
        column_of([tmp_path / "h.jsonl"])


def test_parts_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"ends at 0\.2, expected more than 0\.2"):
        Part(start=0.2, stop=0.2)
    assert "part" not in LocalText(files=("a.txt",)).model_dump()
