"""A model's answers, kept in one pass, against transformers' own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from prune_export.calibrate import (
    CalibrationContext,
    KeptAnswers,
    TokenSet,
    answer_bytes,
    keep_answers,
)
from prune_export.calibrate.passes import answers
from prune_export.calibrate.streaming import checkpointing as saving
from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError
from prune_export.machine import Machine
from tests.heal.conftest import save_tiny, windows
from tests.killed import Killed, killed_after

MACHINE = Machine("cpu", 4 << 30, 0, 1)
FAMILIES = ["llama", "gpt2", "gemma2", "mixtral", "phi"]


def kept(source: Path, out: Path, tokens: TokenSet, **options: Any) -> KeptAnswers:
    opened = Checkpoint.open(source)
    out.mkdir(exist_ok=True)
    asked: dict[str, Any] = {"outcomes": 8, "temperature": 1.0} | options
    keys = ("scratch", "progress")
    own = {key: asked.pop(key) for key in keys if key in asked}
    given = CalibrationContext(tokens, asked.pop("machine", MACHINE), **own)
    keep_answers(opened, given, out, arch=opened.arch(), **asked)
    return KeptAnswers.open(out)


def dense(source: Path, tokens: TokenSet, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(source)(tokens.ids, use_cache=False).logits
    return (logits[:, :-1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("outcomes", "temperature"), [(8, 1.0), (64, 2.0), (1000, 1.0)])
def test_answers_are_those_of_the_model(
    family: str, outcomes: int, temperature: float, tmp_path: Path
) -> None:
    source, tokens = save_tiny(tmp_path / "model", family), windows(samples=9)
    found = kept(source, tmp_path / "out", tokens, outcomes=outcomes, temperature=temperature)
    whole = dense(source, tokens, temperature)
    least = min(outcomes, 64)
    assert (found.samples, found.length) == (9, 16)
    assert (found.outcomes, found.temperature) == (least, temperature)
    ids, log_p = found.of(torch.tensor([3, 8, 0]), "cpu")
    of = whole[[3, 8, 0]]
    torch.testing.assert_close(log_p[..., :least], of.gather(-1, ids), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, 15), rtol=0, atol=1e-5)
    assert log_p.shape[-1] == (9 if least == 8 else 64)
    torch.testing.assert_close(log_p[..., 0], of.amax(-1), rtol=1e-4, atol=2e-5)


def test_bytes_are_what_was_said(tmp_path: Path) -> None:
    source, tokens = save_tiny(tmp_path / "model", "llama"), windows(samples=9)
    file = kept(source, tmp_path / "out", tokens).path
    assert answer_bytes(64, 8) == 8 * 2 + 9 * 4
    assert answer_bytes(64, 64) == answer_bytes(64, 99) == 64 * 6
    assert answer_bytes(128256, 64) == 64 * 4 + 65 * 4
    body = 9 * 15 * answer_bytes(64, 8)
    assert 0 < file.stat().st_size - body < 400


def test_numbers_of_a_large_vocabulary_take_four_bytes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", vocab_size=70_000, hidden_size=8)
    tokens = TokenSet.of(windows(samples=2).ids + 69_000)
    ids, log_p = kept(source, tmp_path / "out", tokens).of(torch.tensor([1]), "cpu")
    torch.testing.assert_close(
        log_p[..., :8], dense(source, tokens)[1:].gather(-1, ids), rtol=1e-4, atol=2e-5
    )
    assert int(ids.max()) > 1 << 16


@pytest.mark.parametrize("spooled", [False, True])
def test_killed_passes_end_in_the_same_bytes(
    spooled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pass dies while it reads predictions, and where states are in files."""
    source, tokens = save_tiny(tmp_path / "model", "llama"), windows(samples=300)
    expected = kept(source, tmp_path / "whole", tokens).path.read_bytes()
    monkeypatch.setattr(saving, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(saving, "_SHARE", 0)
    machine = Machine("cpu", 0, 0, 1) if spooled else MACHINE
    options: dict[str, Any] = {"machine": machine, "scratch": tmp_path / "scratch"}
    options["scratch"].mkdir()
    for count in (2, 4, 5):
        with pytest.raises(Killed):
            kept(source, tmp_path / "out", tokens, progress=killed_after(count), **options)
    with monkeypatch.context() as patch:
        read = torch.Tensor.topk
        calls = iter(range(100))

        def dying(self: torch.Tensor, *args: Any, **named: Any) -> Any:
            if next(calls) == 30:
                raise Killed
            return read(self, *args, **named)

        patch.setattr(torch.Tensor, "topk", dying)
        with pytest.raises(Killed):
            kept(source, tmp_path / "out", tokens, **options)
    assert kept(source, tmp_path / "out", tokens, **options).path.read_bytes() == expected


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    source, tokens = save_tiny(tmp_path / "model", "llama"), windows(samples=3)
    file = kept(source, tmp_path / "out", tokens).path
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a teacher's answers"):
        KeptAnswers.open(tmp_path / "out")


def test_answers_whose_parts_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    tensors = {"ids": torch.zeros(3, 4, 2, dtype=torch.int32), "log_p": torch.zeros(3, 5, 2)}
    save_file(tensors, tmp_path / "answers.safetensors", metadata={"temperature": "1.0"})
    with pytest.raises(CheckpointError, match=r"has log_p \[3, 5, 2\], expected as many as ids"):
        KeptAnswers.open(tmp_path)


def test_what_all_others_have_is_made_in_place() -> None:
    """A row of the vocabulary less in memory, and not a bit changed."""
    random = torch.Generator().manual_seed(0)
    rows = torch.log_softmax(3 * torch.randn(8, 999, generator=random), dim=-1)
    rows[:, 5:70] = -torch.inf
    rows[3] = -torch.inf
    expected, place = rows.logsumexp(1, keepdim=True), rows.data_ptr()
    assert torch.equal(answers._logsumexp_(rows), expected)
    assert rows.data_ptr() == place
