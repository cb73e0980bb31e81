from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HealRecord
from prune_export.errors import PlanError, StageError
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.machine import Machine
from prune_export.training.adapters.targets import targets
from prune_export.training.heal import _refuse_mismatch
from prune_export.training.loop import Run, _picked
from prune_export.training.model import Trainee, plain, trainee
from prune_export.training.settings import Quantization
from tests.heal.conftest import MACHINE, QUICK, logits, save_tiny, windows

Heal = Callable[..., tuple[HealRecord, Path]]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama bfloat16": ("llama", {"dtype": "bfloat16"}),
    "qwen2 with bias": ("qwen2", {}),
    "gpt2 transposed": ("gpt2", {}),
}
HEALERS = {
    "lora": Lora(**QUICK, targets="all"),
    "qlora original": Qlora(**QUICK, targets="all"),
    "qlora quantized": Qlora(**QUICK, merge_into="quantized_base"),
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("healer", HEALERS)
def test_heals_into_a_plain_checkpoint_like_its_source(
    healer: str, model: str, tmp_path: Path, heal: Heal, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, changes = MODELS[model]
    source = save_tiny(tmp_path / "model", kind, **changes)
    record, out = heal(HEALERS[healer], source)
    before, after = weights(source), weights(out)
    assert list(before) == list(after)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    config = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config
    assert (out / "tokenizer_config.json").exists()
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in source.iterdir())
    _, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]

    held_out = record.log["held_out"]["loss"]
    assert held_out["trained"] < held_out["before"] - 0.1
    assert held_out["merged"] < held_out["before"] - 0.1
    losses = [row[1] for row in record.log["loss"]]
    assert [row[0] for row in record.log["loss"]] == list(range(1, 13))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert record.trained_tokens == 12 * 4 * 16
    json.dumps(record.log)
    assert capfd.readouterr() == ("", "")


def test_untargeted_weights_are_the_same_bytes(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    _, out = heal(Qlora(**QUICK), source)
    before, after = weights(source), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}


def trained(healer: Lora | Qlora, source: Path, scratch: Path) -> Trainee:
    """The model as it was at the end of the training whose scratch directory this is."""
    opened = Checkpoint.open(source)
    student = trainee(
        opened,
        [tensor.name for tensor in targets(healer.targets, opened.arch())],
        healer,
        healer._quantization if isinstance(healer, Qlora) else None,
        device="cpu", dtype=torch.float32, gradient_checkpointing=False,
    )  # fmt: skip
    saved = load_file(scratch / "training.safetensors")
    with torch.no_grad():
        for name, parameter in student.trained().items():
            parameter.copy_(saved[name])
    return student


@pytest.mark.parametrize("model", ["llama tied", "qwen2 with bias", "gpt2 transposed"])
@pytest.mark.parametrize("healer", ["lora", "qlora quantized"])
def test_the_result_computes_what_was_trained(
    healer: str, model: str, tmp_path: Path, heal: Heal
) -> None:
    kind, changes = MODELS[model]
    source = save_tiny(tmp_path / "model", kind, **changes)
    _, out = heal(HEALERS[healer], source, scratch=tmp_path / "s")
    student = trained(HEALERS[healer], source, tmp_path / "s")
    result = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(result, logits(student.model), rtol=1e-4, atol=1e-4)
    assert (result - logits(AutoModelForCausalLM.from_pretrained(source))).abs().max() > 0.1


@pytest.mark.parametrize("model", ["llama tied", "gpt2 transposed"])
def test_the_merge_equals_that_of_peft(model: str, tmp_path: Path, heal: Heal) -> None:
    kind, changes = MODELS[model]
    healer = Lora(**QUICK, targets="all", alpha=6)
    source = save_tiny(tmp_path / "model", kind, **changes)
    _, out = heal(healer, source, scratch=tmp_path / "s")
    theirs = trained(healer, source, tmp_path / "s").model.merge_and_unload().state_dict()
    for name, ours in weights(out).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-6, atol=1e-7)


def test_the_quantized_base_is_dequantized_exactly(tmp_path: Path, heal: Heal) -> None:
    import bitsandbytes.functional as bnb

    source = save_tiny(tmp_path / "model", "llama")
    healer = replace(HEALERS["qlora quantized"], learning_rate=1e-12)
    _, out = heal(healer, source)
    for name, value in weights(out).items():
        was = weights(source)[name]
        if name.endswith("proj.weight"):
            was = bnb.dequantize_4bit(
                *bnb.quantize_4bit(was, compress_statistics=True, quant_type="nf4")
            )
        torch.testing.assert_close(value, was, rtol=0, atol=1e-7)


def test_measuring_leaves_the_4_bit_weights_alone(tmp_path: Path) -> None:
    # bitsandbytes repacks them in evaluation on CPUs with AVX-512 bfloat16, losing scale bits.
    source = Checkpoint.open(
        save_tiny(tmp_path / "model", "llama", hidden_size=64, intermediate_size=128)
    )
    student = trainee(
        source, ["model.layers.0.mlp.up_proj.weight"], Lora(rank=2), Quantization(True, "original"),
        device="cpu", dtype=torch.bfloat16, gradient_checkpointing=False,
    )  # fmt: skip
    before = {name: value() for name, value in student.dequantized().items()}
    assert len(before) == 3 * 7
    logits(student.model)
    for name, value in student.dequantized().items():
        assert torch.equal(value(), before[name])


@pytest.mark.parametrize("healer", ["lora", "qlora quantized"])
def test_bfloat16_compute_stays_close_after_the_merge(
    healer: str, tmp_path: Path, heal: Heal
) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    record, _ = heal(replace(HEALERS[healer], compute_dtype="bfloat16"), source)
    losses = record.log["held_out"]["loss"]
    assert record.log["training"]["compute_dtype"] == "bfloat16"
    assert losses["merged"] == pytest.approx(losses["trained"], abs=0.03)


def test_recomputing_activations_changes_nothing(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    plain_run, _ = heal(Lora(**QUICK, gradient_checkpointing=False), source)
    recomputed, _ = heal(Lora(**QUICK, gradient_checkpointing=True), source)
    assert recomputed.log["training"]["gradient_checkpointing"] is True
    assert [row[1] for row in recomputed.log["loss"]] == pytest.approx(
        [row[1] for row in plain_run.log["loss"]], rel=1e-6
    )


def test_micro_batches_add_up_to_the_batch(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    runs = [
        heal(Lora(**QUICK, dropout=0.0, micro_batch=count), source)[0].log["loss"]
        for count in (1, 2, 4)
    ]
    for other in runs[1:]:
        assert [r[1] for r in other] == pytest.approx([r[1] for r in runs[0]], rel=1e-4)


def test_seed_and_epochs_decide_the_data(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    few = windows(samples=6)  # 5 to train on: a step of 4 crosses epochs
    first, again = (heal(Lora(**QUICK), source, tokens=few)[0].log["loss"] for _ in range(2))
    assert first == again
    other = heal(Lora(**QUICK, seed=1), source, tokens=few)[0].log["loss"]
    assert first != other


def test_the_callers_randomness_and_threads_stay(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    threads = torch.get_num_threads()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    heal(Lora(**QUICK | {"steps": 2}), source)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.get_num_threads() == threads


def test_shards_are_those_of_the_source(tmp_path: Path, heal: Heal) -> None:
    whole = save_tiny(tmp_path / "whole", "llama")
    source = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(source, max_shard_size="30KB")
    _, out = heal(Lora(**QUICK | {"steps": 2}), source)
    index = "model.safetensors.index.json"
    maps = [json.loads((path / index).read_text())["weight_map"] for path in (source, out)]
    assert maps[0] == maps[1]
    assert len(set(maps[0].values())) > 2


@pytest.mark.parametrize("steps", [QUICK["steps"], 1])
def test_a_diverging_run_stops_and_says_why(steps: int, tmp_path: Path, heal: Heal) -> None:
    """With one step, no later one sees what it did."""
    source = save_tiny(tmp_path / "model", "llama")
    diverging = QUICK | {"learning_rate": 1e30, "steps": steps}
    with pytest.raises(StageError, match="lower `learning_rate`"):
        heal(Lora(**diverging, schedule="constant"), source)
    assert not any(tmp_path.glob("out*")), "nothing is written"


def test_one_window_is_too_few(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    with pytest.raises(StageError, match="at least 2"):
        heal(Lora(**QUICK), source, tokens=windows(samples=1))


RUN = Run("cpu", 1, "float32", 1, False, 1)


@pytest.mark.parametrize(
    ("quantization", "trained_loss", "merged_loss", "fix"),
    [
        (None, 2.0, 2.01, "report"),
        (None, 2.0, 1.99, "report"),
        (Quantization(True, "quantized_base"), 2.0, 2.01, "report"),
        (Quantization(True, "original"), 2.0, 2.2, "quantized_base"),
        (None, 2.0, float("nan"), "report"),
        (Quantization(True, "original"), 2.0, float("nan"), "quantized_base"),
    ],
)
def test_a_result_that_is_not_what_was_trained_is_refused(
    quantization: Quantization | None,
    trained_loss: float,
    merged_loss: float,
    fix: str,
    tmp_path: Path,
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "model", "llama"))
    with pytest.raises(StageError, match=fix):
        _refuse_mismatch(
            {"before": 2.1, "trained": trained_loss, "merged": merged_loss},
            RUN,
            quantization,
            source,
        )


def test_a_better_base_may_be_better(tmp_path: Path) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "model", "llama"))
    original = Quantization(True, "original")
    for before, merged in ((2.0, 1.6), (4.0, 2.9)):
        losses = {"before": before, "trained": 2.0, "merged": merged}
        _refuse_mismatch(losses, RUN, original, source)


def test_a_result_larger_than_memory_is_measured_from_disk(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=False)
    small = Machine("cpu", 60_000, 0, 1)
    nbytes = Checkpoint.open(source).nbytes
    assert nbytes > small.ram_bytes
    model = plain(source, nbytes, small, tmp_path / "scratch")
    assert "disk" in set(model.hf_device_map.values())
    expected = logits(plain(source, nbytes, MACHINE, tmp_path / "scratch"))
    assert torch.equal(logits(model), expected)


def test_only_what_counts_is_trained_on(tmp_path: Path, heal: Heal) -> None:
    """What the assistant says is learnt; noise that a user says is not, and does not judge."""
    source = save_tiny(tmp_path / "model", "llama")
    clean = windows().ids
    noise = torch.randint(0, 64, clean.shape, generator=torch.Generator().manual_seed(0))
    counted = torch.zeros_like(clean, dtype=torch.bool)
    counted[:, 8:] = True
    counted[::3, :12] = False  # windows of which less counts
    ids = torch.where(torch.arange(16) < 7, noise, clean)
    marked = TokenSet.of(ids, counted=counted)
    record, out = heal(Lora(**QUICK), source, tokens=marked)
    losses = record.log["held_out"]["loss"]
    assert losses["trained"] < losses["before"] - 0.05
    assert losses["merged"] == pytest.approx(losses["trained"], abs=2e-3)
    trained_on = [counted[_picked(step, 36, Lora(**QUICK)), 1:] for step in range(12)]
    assert record.trained_tokens == sum(int(one.sum()) for one in trained_on)
    model = AutoModelForCausalLM.from_pretrained(out)
    labels = ids.masked_fill(~counted, -100)[-4:]
    with torch.no_grad():
        expected = float(model(input_ids=ids[-4:], labels=labels).loss)
    assert losses["merged"] == pytest.approx(expected, abs=1e-4)
    everything, _ = heal(Lora(**QUICK), source, tokens=TokenSet.of(ids))
    assert everything.log["held_out"]["loss"]["before"] != losses["before"]


def test_micro_batches_of_marked_windows_make_one_step(tmp_path: Path, heal: Heal) -> None:
    """Each token counts alike in a step, however its windows are split."""
    source = save_tiny(tmp_path / "model", "llama")
    counted = torch.rand(40, 16, generator=torch.Generator().manual_seed(1)) < 0.3
    counted[:, 5] = True
    tokens = TokenSet.of(windows().ids, counted=counted)
    losses = []
    for micro in (1, 4):
        record, _ = heal(Lora(**QUICK, micro_batch=micro, dropout=0), source, tokens=tokens)
        losses.append([row[1] for row in record.log["loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_tokens_that_the_model_lacks_are_refused(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    ids = windows().ids.clone()
    ids[3, 4] = 64
    with pytest.raises(PlanError, match="holds token id 64, but the model knows 64 ids"):
        heal(Lora(**QUICK), source, tokens=TokenSet.of(ids))
