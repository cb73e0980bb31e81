from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint, Planned, write_checkpoint
from prune_export.checkpoint.header import TORCH
from prune_export.checkpoint.writer import lay_out
from prune_export.errors import CheckpointError, PlanError
from tests.checkpoint.raw_safetensors import parts
from tests.saved_models import contents

Saved = Callable[..., Path]
CONFIG = {"model_type": "llama"}
PLAIN = sorted(set(TORCH) - {"F8_E8M0", "U16", "U32", "U64", "C64"})


def planned(name: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> Planned:
    """A tensor of random bits; zeros where bits could be no valid value."""
    kind = getattr(torch, TORCH[dtype])

    def content() -> torch.Tensor:
        tensor = torch.zeros(shape, dtype=kind)
        if kind != torch.bool and tensor.numel():
            bits = torch.Generator().manual_seed(seed)
            flat = tensor.reshape(-1).view(torch.uint8)
            flat.copy_(torch.randint(0, 256, flat.shape, dtype=torch.uint8, generator=bits))
        return tensor

    return Planned(name, dtype, shape, content)


def copies(checkpoint: Checkpoint) -> list[Planned]:
    return [
        Planned(name, entry.dtype, entry.shape, entry) for name, entry in checkpoint.entries.items()
    ]


def data(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor, whatever file holds them."""
    return {
        name: entry.file.read_bytes()[entry.start : entry.stop]
        for name, entry in Checkpoint.open(path).entries.items()
    }


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
TENSORS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(PLAIN), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(tensors=TENSORS, limit=st.integers(1, 400))
def test_whatever_is_written_reads_back_here_and_in_safetensors(
    tensors: dict[str, tuple[str, tuple[int, ...]]], limit: int
) -> None:
    plan = [planned(name, *of, seed=i) for i, (name, of) in enumerate(tensors.items())]
    with TemporaryDirectory() as place:
        first = write_checkpoint(
            Path(place) / "a", CONFIG, plan, max_shard_bytes=limit, fsync=False
        )
        assert {n: (e.dtype, e.shape) for n, e in first.entries.items()} == tensors
        for file in first.files:
            with safe_open(file, framework="pt") as theirs:
                assert theirs.metadata() == {"format": "pt"}
                for name in theirs.keys():  # noqa: SIM118 - it is not a mapping
                    ours = first.read(name)
                    assert ours.dtype == theirs.get_tensor(name).dtype
                    assert ours.shape == theirs.get_tensor(name).shape
                    bits = ours.reshape(-1).view(torch.uint8)
                    assert torch.equal(bits, theirs.get_tensor(name).reshape(-1).view(torch.uint8))
        second = write_checkpoint(
            Path(place) / "b", CONFIG, copies(first), max_shard_bytes=limit, fsync=False
        )
        assert data(first.path) == data(second.path)


@settings(max_examples=60, deadline=None)
@given(tensors=TENSORS, limit=st.integers(1, 400))
def test_every_tensor_is_aligned_and_no_shard_too_large(
    tensors: dict[str, tuple[str, tuple[int, ...]]], limit: int
) -> None:
    plan = [planned(name, *of) for name, of in tensors.items()]
    shards = lay_out(plan, limit)
    assert sorted(t.name for shard in shards for t in shard.tensors) == sorted(tensors)
    for shard in shards:
        assert len(shard.header) % 8 == 0
        assert len(shard.tensors) == 1 or sum(t.nbytes for t in shard.tensors) <= limit
        at = 0
        for tensor in shard.tensors:
            assert at % torch.empty(0, dtype=getattr(torch, TORCH[tensor.dtype])).itemsize == 0
            at += tensor.nbytes
    order = {name: number for number, name in enumerate(tensors)}
    for shard, after in pairwise(shards):
        first = min(after.tensors, key=lambda tensor: order[tensor.name])
        assert sum(t.nbytes for t in shard.tensors) + first.nbytes > limit  # no room was left
        assert max(order[t.name] for t in shard.tensors) < order[first.name]


def test_the_index_is_as_transformers_writes_it(saved: Saved, tmp_path: Path) -> None:
    theirs = json.loads((saved("llama", shard="20KB") / "model.safetensors.index.json").read_text())
    source = Checkpoint.open(saved("llama", shard="20KB"))
    write_checkpoint(tmp_path, source.config, copies(source), max_shard_bytes=20_000)
    ours = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert list(ours["weight_map"]) == sorted(ours["weight_map"])


def test_transformers_loads_it(saved: Saved, tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama"))
    write_checkpoint(tmp_path, source.config, copies(source), max_shard_bytes=30_000)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    wanted = load_file(saved("llama") / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_the_same_again_gives_the_same_bytes(saved: Saved, tmp_path: Path, limit: int) -> None:
    source = Checkpoint.open(saved("llama"))
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, source.config, copies(source), max_shard_bytes=limit)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_earlier_attempt_leaves_no_trace(saved: Saved, tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama"))
    write_checkpoint(tmp_path / "a", source.config, copies(source))
    write_checkpoint(tmp_path / "b", source.config, copies(source), max_shard_bytes=20_000)
    (tmp_path / "b" / ".model.safetensors.partial").write_bytes(b"cut off")
    write_checkpoint(tmp_path / "b", source.config, copies(source))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_permissions_follow_the_umask(saved: Saved, tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama"))
    before = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "a", CONFIG, copies(source), max_shard_bytes=20_000)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()}
    assert modes == {0o640}


def test_config_keys_keep_their_order_and_letters(tmp_path: Path) -> None:
    config = {"model_type": "llama", "zebra": "ß", "alpha": 1}
    write_checkpoint(tmp_path, config, [planned("a", "F32", (2,))])
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == list(config)
    assert "ß" in text


def test_side_files_come_along(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint(
        tmp_path / "out",
        CONFIG,
        [planned("a", "F32", (2,))],
        side_files=[tmp_path / "tokenizer.json"],
    )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


# --- copying -----------------------------------------------------------------------------------


def refusing(code: int) -> Callable[..., int]:
    def call(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("without", [["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_bytes_are_the_same_where_the_kernel_cannot_copy(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, without: list[str]
) -> None:
    source = Checkpoint.open(saved("llama"))
    write_checkpoint(tmp_path / "a", CONFIG, copies(source))
    for call in without:
        monkeypatch.setattr(os, call, refusing(code))
    write_checkpoint(tmp_path / "b", CONFIG, copies(source))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_copy_keeps_its_place_in_the_page(saved: Saved, tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama"))
    written = write_checkpoint(tmp_path / "a", CONFIG, copies(source)[3:])
    moved = {
        (entry.start - source.entries[name].start) % 4096 for name, entry in written.entries.items()
    }
    assert moved == {0}
    header, _ = parts(tmp_path / "a" / "model.safetensors")
    assert header["__metadata__"] == {"format": "pt"}


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    size = 2**27
    one = Planned(
        "a", "U8", (size,), lambda: (torch.zeros(2**20, dtype=torch.uint8) for _ in range(128))
    )
    write_checkpoint(tmp_path / "source", CONFIG, [one], fsync=False)  # fmt: skip
    code = (
        "import sys, resource\n"
        "from pathlib import Path\n"
        "from prune_export.checkpoint import Checkpoint, Planned, write_checkpoint\n"
        f"source = Checkpoint.open({str(tmp_path / 'source')!r})\n"
        "entry = source.entries['a']\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "write_checkpoint(Path(sys.argv[1]), source.config,"
        " [Planned('a', 'U8', entry.shape, entry)], fsync=False)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < size / 8


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: torch.zeros(3, 2), "got shape [3, 2]"),
        (lambda: torch.zeros(2, 3, dtype=torch.float16), "got dtype float16"),
        (lambda: iter([torch.zeros(5)]), "got 5 elements"),
        (lambda: iter([torch.zeros(4), torch.zeros(4)]), "got 8 elements"),
        (lambda: iter([torch.zeros(6, dtype=torch.int32)]), "got dtype int32"),
    ],
)
def test_content_that_is_not_as_planned_is_refused(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path, CONFIG, [Planned("a", "F32", (2, 3), value)])
    assert said in str(caught.value)
    assert "planned were float32 [2, 3]" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_no_file(tmp_path: Path) -> None:
    def pieces() -> Iterator[torch.Tensor]:
        yield torch.zeros(2)
        raise KeyboardInterrupt

    plan = [planned("a", "F32", (4,)), Planned("b", "F32", (4,), pieces)]
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, CONFIG, plan, max_shard_bytes=16)
    assert list(tmp_path.iterdir()) == []


def test_a_source_cut_while_it_is_copied_is_noticed(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    os.truncate(source.files[0], source.files[0].stat().st_size - 10)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        write_checkpoint(tmp_path / "out", CONFIG, copies(source))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    huge = Planned("a", "F32", (2**50,), lambda: torch.zeros(1))
    with pytest.raises(PlanError, match=r"needs 4194304\.02 GiB of disk"):
        write_checkpoint(tmp_path / "new" / "out", CONFIG, [huge])
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_checkpoint(tmp_path, CONFIG, [planned("a", "F32", (4096,))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written: File too large" in str(caught.value)
    assert caught.value.where == str(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
def test_names_that_cannot_be_are_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the name is taken"):
        write_checkpoint(tmp_path, CONFIG, [planned(name, "F32", (2,)) for name in names])


def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be printed"):
        write_checkpoint(tmp_path, CONFIG, [planned("a\x1b[2J", "F32", (2,))])


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="expected at least one"):
        write_checkpoint(tmp_path, CONFIG, [])
    with pytest.raises(PlanError, match="expected at least 1"):
        write_checkpoint(tmp_path, CONFIG, [planned("a", "F32", (2,))], max_shard_bytes=0)


def test_writing_over_the_source_is_refused(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("llama"), tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    before = contents(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    for out in (tmp_path / "source", tmp_path / "link"):
        with pytest.raises(PlanError, match="is the directory that is read from"):
            write_checkpoint(out, CONFIG, copies(source))
    assert contents(tmp_path / "source") == before
