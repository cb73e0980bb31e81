from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prune_export.calibrate import TokenSet, changed_since_first, token_set
from prune_export.calibrate.data import decoding
from prune_export.errors import CheckpointError, MissingExtra, PlanError
from prune_export.recipe import HubDataset, LocalText, TokenFile

WORDS = [f"w{i}" for i in range(200)]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tokenizer(tmp_path / "plain", bos=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def tokenizer(path: Path, *, bos: bool, single: str = "<s> $A") -> Path:
    """A tokenizer of whole words, saved; word w7 is id 7 + 3."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        built.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def text(start: int, count: int) -> str:
    return " ".join(WORDS[i % 200] for i in range(start, start + count))


def jsonl(path: Path, texts: Sequence[str], column: str = "text") -> None:
    lines = "\n".join(json.dumps({column: one}) for one in texts) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)


def local(*files: str, **settings: Any) -> LocalText:
    return LocalText(files=files, **{"length": 8, "packing": "packed", **settings})


def test_packed_joins_documents_by_the_end_of_text(plain: Path, root: Path) -> None:
    jsonl(root / "a.jsonl", [text(0, 5), text(50, 9)])
    found = token_set(local("a.jsonl"), plain, root)
    assert sorted(found.ids.tolist()) == [
        [3, 4, 5, 6, 7, 2, 53, 54],
        [55, 56, 57, 58, 59, 60, 61, 2],
    ]
    assert found.provenance["windows_available"] == 2
    assert "a.jsonl" in found.provenance["files"]
    assert str(root) not in json.dumps(dict(found.provenance))


@pytest.mark.parametrize("packing", ["packed", "windows"])
def test_every_window_begins_as_the_tokenizer_begins(
    tmp_path: Path, root: Path, packing: str
) -> None:
    jsonl(root / "a.jsonl", [text(i, 20) for i in range(10)])
    with_bos = tokenizer(tmp_path / "bos", bos=True)
    found = token_set(local("a.jsonl", packing=packing), with_bos, root)
    assert (found.ids[:, 0] == 1).all()
    assert (found.ids[:, 1:] != 1).all()


def test_each_window_of_a_stream_begins_as_the_tokenizer_begins(tmp_path: Path, root: Path) -> None:
    """As lm-eval has it; the window keeps its length, and no text is lost between windows."""
    jsonl(root / "a.jsonl", [text(i, 20) for i in range(3)])
    with_bos = tokenizer(tmp_path / "bos", bos=True)
    found = token_set(local("a.jsonl", packing="stream"), with_bos, root)
    assert found.ids.shape == (8, 8)
    assert (found.ids[:, 0] == 1).all()
    backend = PreTrainedTokenizerFast.from_pretrained(with_bos)
    expected = backend("\n\n".join(text(i, 20) for i in range(3)))["input_ids"][1:]
    assert found.ids[:, 1:].flatten().tolist() == expected[:56]
    assert found.provenance["prefix"] == "every window"
    assert found.counted is None
    some = token_set(local("a.jsonl", packing="stream", samples=5), with_bos, root)
    assert torch.equal(some.ids, found.ids[:5])


def test_a_stream_that_begins_once_is_the_protocol_of_the_papers(
    tmp_path: Path, root: Path
) -> None:
    jsonl(root / "a.jsonl", [text(i, 20) for i in range(3)])
    with_bos = tokenizer(tmp_path / "bos", bos=True)
    found = token_set(local("a.jsonl", packing="stream", prefix="first"), with_bos, root)
    assert found.provenance["prefix"] == "first window"
    backend = PreTrainedTokenizerFast.from_pretrained(with_bos)
    expected = backend("\n\n".join(text(i, 20) for i in range(3)))["input_ids"]
    assert found.ids.flatten().tolist() == expected[: found.ids.numel()]
    assert (found.ids == 1).sum() == 1


def test_a_longer_prefix_is_not_counted(tmp_path: Path, root: Path) -> None:
    """What follows its first token is no prediction of text; the text's first token is one."""
    jsonl(root / "a.jsonl", [text(i, 20) for i in range(3)])
    two = tokenizer(tmp_path / "two", bos=True, single="<s> </s> $A")
    found = token_set(local("a.jsonl", packing="stream"), two, root)
    assert found.ids[:, :2].unique(dim=0).tolist() == [[1, 2]]
    assert found.counted is not None
    assert found.counted.unique(dim=0).tolist() == [[False] * 2 + [True] * 6]


@pytest.mark.parametrize("packing", ["packed", "windows", "stream"])
def test_without_a_prefix_nothing_changes(plain: Path, root: Path, packing: str) -> None:
    """The bytes of token sets are part of what names artifacts: these were made by 0.1."""
    jsonl(root / "a.jsonl", [text(7 * i, 20) for i in range(9)])
    found = token_set(local("a.jsonl", packing=packing, samples=5), plain, root)
    once = token_set(local("a.jsonl", packing=packing, samples=5, prefix="first"), plain, root)
    assert found.fingerprint == once.fingerprint
    assert not changed_since_first(local("a.jsonl", packing=packing), plain, root)
    assert set(found.provenance) == {
        "packing", "length", "samples", "seed", "column", "tokenizer", "files", "documents_read",
        "documents_excluded", "windows_available",
    }  # fmt: skip
    assert local("a.jsonl", packing=packing, samples=5).model_dump(mode="json") == {
        "samples": 5, "length": 8, "seed": 0, "column": "text", "packing": packing,
        "files": ["a.jsonl"],
    }  # fmt: skip
    assert HubDataset(dataset="a/b").model_dump(mode="json") == {
        "samples": None, "length": 2048, "seed": 0, "column": "text", "packing": None,
        "dataset": "a/b", "config": None, "split": "train", "revision": None,
    }  # fmt: skip


def test_every_format_holds_the_same_text(plain: Path, root: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    one = text(0, 40)
    (root / "a.txt").write_text(one)
    (root / "a.txt.gz").write_bytes(gzip.compress(one.encode()))
    jsonl(root / "a.jsonl", [one])
    jsonl(root / "a.jsonl.gz", [one])
    parquet.write_table(pa.table({"text": [one]}), root / "a.parquet")
    names = ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"]
    found = [token_set(local(name), plain, root) for name in names]
    assert all(torch.equal(one.ids, found[0].ids) for one in found)
    assert all(one.documents == found[0].documents for one in found)


def test_globs_are_sorted_and_another_column_is_read(plain: Path, root: Path) -> None:
    (root / "deep").mkdir()
    jsonl(root / "deep" / "b.jsonl", [text(100, 8)], "body")
    jsonl(root / "deep" / "a.jsonl", [text(0, 8)], "body")
    source = local("**/*.jsonl", column="body", packing="stream")
    found = token_set(source, plain, root)
    assert found.ids[:, 0].tolist() == [3, 103]
    assert list(found.provenance["files"]) == ["deep/a.jsonl", "deep/b.jsonl"]


def test_excluded_documents_are_left_out_and_counted(plain: Path, root: Path) -> None:
    texts = [text(10 * i, 30) for i in range(12)]
    jsonl(root / "evaluation.jsonl", texts[:4])
    jsonl(root / "healing.jsonl", texts)
    held = token_set(local("evaluation.jsonl", packing="stream"), plain, root)
    assert len(held.documents) == 4
    healing = token_set(local("healing.jsonl"), plain, root, exclude=frozenset(held.documents))
    assert not set(healing.documents) & set(held.documents)
    assert len(healing.documents) == 8
    assert healing.provenance["documents_excluded"] == 4
    assert healing.provenance["documents_read"] == 12


def test_the_same_source_gives_the_same_fingerprint(plain: Path, root: Path) -> None:
    jsonl(root / "a.jsonl", [text(i, 30) for i in range(20)])
    first = token_set(local("a.jsonl", samples=5), plain, root)
    again = token_set(local("a.jsonl", samples=5), plain, root)
    other = token_set(local("a.jsonl", samples=5, seed=1), plain, root)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.ids.shape == (5, 8)


@pytest.mark.parametrize("packing", ["packed", "windows", "stream"])
def test_too_little_text_says_how_much_there_is(plain: Path, root: Path, packing: str) -> None:
    jsonl(root / "a.jsonl", [text(0, 16)] * 3)
    with pytest.raises(PlanError, match=r"holds [3-6] windows of 8 tokens in 3 documents"):
        token_set(local("a.jsonl", samples=50, packing=packing), plain, root)


def test_no_text_at_all_is_refused(plain: Path, root: Path) -> None:
    jsonl(root / "a.jsonl", ["", "  "])
    with pytest.raises(PlanError, match="holds 0 windows"):
        token_set(local("a.jsonl"), plain, root)


@pytest.mark.parametrize("pattern", ["../secret.txt", "/etc/passwd", "x/../../secret.txt", "."])
def test_paths_that_leave_the_root_are_refused(plain: Path, root: Path, pattern: str) -> None:
    (root.parent / "secret.txt").write_text(text(0, 99))
    with pytest.raises(PlanError, match="leaves the data directory"):
        token_set(local(pattern), plain, root)
    if pattern != ".":
        with pytest.raises(PlanError, match="leaves the data directory"):
            token_set(TokenFile(tokens=pattern), plain, root)


def test_links_out_of_the_root_are_refused(plain: Path, root: Path) -> None:
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "secret.txt").write_text(text(0, 99))
    (root / "file.txt").symlink_to(root.parent / "outside" / "secret.txt")
    (root / "folder").symlink_to(root.parent / "outside")
    for pattern in ("file.txt", "*.txt", "folder/secret.txt", "folder/*.txt"):
        with pytest.raises(PlanError, match="link out of it"):
            token_set(local(pattern), plain, root)


def test_links_inside_the_root_are_followed(plain: Path, root: Path) -> None:
    (root / "a.txt").write_text(text(0, 30))
    (root / "b.txt").symlink_to(root / "a.txt")
    assert token_set(local("b.txt"), plain, root).samples == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "w1"}\n{"text": \n', r"a.jsonl:2\n  is not JSON"),
        ("a.jsonl", b'{"txet": "w1"}\n', r"has no text in `text`\n  did you mean `txet`"),
        ("a.jsonl", b'["w1"]\n', r"a\.jsonl:1\n  is a list, expected an object"),
        ("a.jsonl", b'{"text": 3, "body": "w1"}\n', r"`text` is a number, expected.*\n.*`body`"),
        ("a.parquet", b"PAR1 nonsense", "is not Parquet"),
        ("a.csv", b"w1,w2", "has another format"),
    ],
)
def test_broken_files_are_named(
    plain: Path, root: Path, name: str, content: bytes, message: str
) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(PlanError, match=message):
        token_set(local(name), plain, root)


def test_a_missing_file_is_named(plain: Path, root: Path) -> None:
    with pytest.raises(PlanError, match=r"`no\.txt` names no file"):
        token_set(local("no.txt"), plain, root)


def test_a_document_that_would_fill_the_memory_is_refused(
    plain: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LONGEST_DOCUMENT_BYTES", 1000)
    jsonl(root / "a.jsonl.gz", [text(0, 100_000)])
    (root / "a.txt.gz").write_bytes(gzip.compress(text(0, 100_000).encode()))
    for name in ("a.jsonl.gz", "a.txt.gz"):
        with pytest.raises(PlanError, match="more than 1000 bytes"):
            token_set(local(name), plain, root)


def test_a_missing_tokenizer_is_named(tmp_path: Path, root: Path) -> None:
    (root / "a.txt").write_text("w1")
    (tmp_path / "none").mkdir()
    with pytest.raises(PlanError, match=r"tokenizer\n  cannot be read"):
        token_set(local("a.txt"), tmp_path / "none", root)


def test_without_a_network_the_hub_gives_a_clear_error(plain: Path, root: Path) -> None:
    with pytest.raises(PlanError, match=r"could not be read from the Hub.*\n.*local text"):
        token_set(HubDataset(dataset="allenai/c4", config="en"), plain, root)


@pytest.mark.parametrize("dataset", ["../data", "/etc", "a/b/c", "json:x", "-"])
def test_a_dataset_that_is_no_hub_id_is_refused(plain: Path, root: Path, dataset: str) -> None:
    with pytest.raises(PlanError, match="is not a Hub dataset id"):
        token_set(HubDataset(dataset=dataset), plain, root)


def test_a_local_directory_is_no_hub_dataset(
    plain: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    with pytest.raises(PlanError, match="is not a Hub dataset id"):
        token_set(HubDataset(dataset="data"), plain, root)


def test_without_datasets_the_extra_is_named(
    plain: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"prune-export\[data\]"):
        token_set(HubDataset(dataset="allenai/c4"), plain, root)


def test_saved_tokens_come_back_equal_and_in_the_same_bytes(plain: Path, root: Path) -> None:
    jsonl(root / "a.jsonl", [text(i, 30) for i in range(20)])
    made = token_set(local("a.jsonl"), plain, root)
    made.save(root / "tokens.safetensors")
    made.save(root / "again.safetensors")
    assert (root / "tokens.safetensors").read_bytes() == (root / "again.safetensors").read_bytes()
    loaded = TokenSet.load(root / "tokens.safetensors")
    assert torch.equal(loaded.ids, made.ids)
    assert (loaded.fingerprint, loaded.documents, dict(loaded.provenance)) == (
        made.fingerprint,
        made.documents,
        dict(made.provenance),
    )
    found = token_set(TokenFile(tokens="tokens.safetensors", length=8), plain, root)
    assert found.fingerprint == made.fingerprint
    fewer = token_set(TokenFile(tokens="tokens.safetensors", length=4, samples=2), plain, root)
    assert torch.equal(fewer.ids, made.ids[:2, :4])
    assert fewer.fingerprint != made.fingerprint


def test_saved_tokens_that_are_too_few_or_overlap_are_refused(plain: Path, root: Path) -> None:
    jsonl(root / "a.jsonl", [text(0, 30)])
    made = token_set(local("a.jsonl"), plain, root)
    made.save(root / "t.safetensors")
    with pytest.raises(PlanError, match="holds 3 windows of 8 tokens, expected 9 of 8"):
        token_set(TokenFile(tokens="t.safetensors", samples=9, length=8), plain, root)
    with pytest.raises(PlanError, match="shares 1 documents"):
        token_set(
            TokenFile(tokens="t.safetensors", length=8), plain, root,
            exclude=frozenset(made.documents),
        )  # fmt: skip


def test_changed_or_foreign_token_files_are_refused(plain: Path, root: Path) -> None:
    jsonl(root / "a.jsonl", [text(0, 30)])
    file = root / "t.safetensors"
    token_set(local("a.jsonl"), plain, root).save(file)
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="it was changed"):
        TokenSet.load(file)
    for content in (b"", b"\x80\x04nonsense", bytes(data[:40])):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a token set"):
            TokenSet.load(file)
