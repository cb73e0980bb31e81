"""Every way a model directory can be broken that we know of, and what is said about it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.header import nbytes
from prune_export.errors import CheckpointError, PruneExportError
from tests.checkpoint.broken import CASES, ONE, Break
from tests.checkpoint.raw_safetensors import write


@pytest.mark.parametrize(("broken", "said", "kind"), CASES)
def test_each_is_refused_with_its_own_words(
    broken: Break,
    said: tuple[str, ...],
    kind: type[PruneExportError],
    saved: Callable[..., Path],
    tmp_path: Path,
) -> None:
    shard = "20KB" if broken.__name__.startswith("sharded") else "5GB"
    path = tmp_path / "model"
    shutil.copytree(saved("llama", tie_word_embeddings=False, shard=shard), path)
    Checkpoint.open(path).arch()  # sound before
    broken(path)
    with pytest.raises(kind) as caught:
        Checkpoint.open(path).arch()
    for words in said:
        assert words in str(caught.value)
    assert str(path) in caught.value.where
    assert caught.value.problem


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Random bytes in random places: either another sound file, or a CheckpointError."""
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    rows = {"a": ("F32", [2, 3]), "b": ("BF16", [5]), "c": ("U8", [])}
    header, at = {}, 0
    for name, (dtype, shape) in rows.items():
        stop = at + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, stop]}
        at = stop
    write(path / ONE, header, bytes(at))
    whole = bytearray((path / ONE).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] = data.draw(
            st.one_of(st.sampled_from(b'0123456789[]{},:"-'), st.integers(0, 255))
        )
    (path / ONE).write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]) or b"")
    if data.draw(st.booleans()):
        (path / ONE).write_bytes(bytes(whole))
    try:
        opened = Checkpoint.open(path)
    except CheckpointError:
        return
    assert opened.nbytes == sum(entry.nbytes for entry in opened.entries.values()) <= at
    for name in opened.entries:
        opened.read(name)


def test_no_two_cases_are_the_same() -> None:
    assert len(CASES) >= 50
    assert len({param.id for param in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("name", "said"),
    [("m.gguf", "is a GGUF file"), ("m.bin", "pickles can run code"), ("m.pt", "save_pretrained")],
)
def test_a_file_is_not_a_directory(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(tmp_path / name)
