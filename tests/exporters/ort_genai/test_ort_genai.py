"""The ort_genai exporter: what it refuses, what it corrects, and that its engines are right."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pydantic import TypeAdapter, ValidationError

from prune_export.arch import Arch
from prune_export.contracts import Work
from prune_export.errors import CheckpointError, MissingExtra, PlanError, StageError
from prune_export.exporters.ort_genai import OrtGenai, support
from prune_export.exporters.ort_genai.graph import decode_bytes
from prune_export.exporters.ort_genai.runner import OgRunner
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.registry import find

MACHINE = Machine(device="cpu", ram_bytes=4 << 30, gpu_bytes=0, threads=1)
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
WINDOW = 8
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama untied, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, odd sizes": ("Llama", {"hidden_size": 72, "head_dim": 16, "intermediate_size": 100}),
    "llama3 rope, gelu": ("Llama", {"rope_parameters": LLAMA3, "hidden_act": "gelu"}),
    "mistral, window": ("Mistral", {"sliding_window": WINDOW}),
    "mistral, 5 heads": ("Mistral", {"sliding_window": None, "num_attention_heads": 5,
                                     "num_key_value_heads": 1, "head_dim": 16}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW,
                                "max_window_layers": 1}),
    "qwen2, linear rope": ("Qwen2", {"rope_parameters": LINEAR}),
    "qwen3": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 7}),
    "phi": ("Phi", {"hidden_size": 128, "partial_rotary_factor": 0.5}),
    "phi3, window": ("Phi3", {"sliding_window": WINDOW, "original_max_position_embeddings": 512}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "attention_multiplier": 0.2,
                            "residual_multiplier": 0.5, "logits_scaling": 2.0}),
}  # fmt: skip
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown to the builder": ("Olmo2", {}, "does not know Olmo2ForCausalLM"),
    "no family of ours": ("GPT2", {"n_embd": 64, "n_head": 4}, "does not know GPT2LMHeadModel"),
    "head size": ("Llama", {"head_dim": 24}, "heads in units of 16, got head size 24"),
    "rotary size": ("Phi", {"partial_rotary_factor": 0.5}, "got 8 of the 16 of a head"),
    "linear rope of llama": ("Llama", {"rope_parameters": LINEAR}, "rotary scaling ['linear']"),
    "yarn rope": ("Qwen2", {"rope_parameters": YARN}, "rotary scaling ['yarn']"),
    "blocks without rope": ("SmolLM3", {"no_rope_layer_interval": 2}, "no_rope_layers"),
    "normed queries of phi": ("Phi", {"hidden_size": 128, "qk_layernorm": True}, "qk_layernorm"),
    "activation": ("Llama", {"hidden_act": "mish"}, "activation 'mish'"),
}


def config_of(family: str, keys: dict[str, Any]) -> Any:
    return getattr(transformers, f"{family}Config")(**{**SMALL, **keys})


def arch_of(family: str, keys: dict[str, Any]) -> Arch:
    """The config alone, as `check` reads it; no table is needed to refuse."""
    llama = Arch.from_config(config_of("Llama", {}).to_dict())
    return replace(llama, config=MappingProxyType(config_of(family, keys).to_dict()))


def model_in(folder: Path, family: str, keys: dict[str, Any], dtype: Any = torch.float32) -> Any:
    """A random model whose logits tell right from wrong, saved with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, keys)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.to(dtype).save_pretrained(folder)
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return model.float()


def export(exporter: OrtGenai, source: Path, out: Path) -> Any:
    out.mkdir(parents=True)
    return exporter.export(source, out, Work(MACHINE, Silent(), out.parent / f"{out.name}-scratch"))


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return found


def some_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, length))


# --- before anything is built -------------------------------------------------------------------


def test_the_file_name_is_its_name() -> None:
    assert find("exporters", "ort_genai") is OrtGenai


def test_keys_are_checked() -> None:
    adapter = TypeAdapter(OrtGenai)
    assert adapter.validate_python({"precision": "int4"}) == OrtGenai(precision="int4")
    for bad in ({"precision": "int2"}, {"block_size": 48}, {"accuracy_level": 2}):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


def test_architectures_are_read_from_the_installed_builder() -> None:
    known = support.architectures()
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"} <= known
    assert not {"Olmo2ForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"} & known


@pytest.mark.parametrize("case", RIGHT)
def test_accepts(case: str) -> None:
    OrtGenai().check(arch_of(*RIGHT[case]), MACHINE)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_the_builder_gets_wrong(case: str) -> None:
    family, keys, reason = REFUSED[case]
    with pytest.raises(PlanError) as caught:
        OrtGenai().check(arch_of(family, keys), MACHINE)
    assert reason in caught.value.problem
    assert "`onnx`" in caught.value.fix


def test_refuses_blocks_of_different_sizes() -> None:
    arch = Arch.from_config(config_of("Llama", {}).to_dict())
    with pytest.raises(PlanError, match=r"\['mlp'\] differ by block"):
        OrtGenai().check(arch.resized("mlp.1", 64), MACHINE)


def test_refuses_another_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Arch.from_config(config_of("Llama", {}).to_dict())
    monkeypatch.setattr(metadata, "version", lambda package: "0.19.0")
    with pytest.raises(PlanError, match=r"got onnxruntime-genai 0\.19\.0"):
        OrtGenai().check(arch, MACHINE)


def test_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    arch = Arch.from_config(config_of("Llama", {}).to_dict())
    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(MissingExtra, match=r"prune-export\[onnx\]"):
        OrtGenai().check(arch, MACHINE)


def test_corrections() -> None:
    def corrected(family: str, **keys: Any) -> dict[str, Any]:
        return support.corrections(config_of(family, keys).to_dict())

    assert corrected("Llama") == {"architectures": ["LlamaForCausalLM"]}
    assert corrected("Mistral", sliding_window=8)["layer_types"] == ["sliding_attention"] * 3
    assert "layer_types" not in corrected("Mistral", sliding_window=None)
    assert corrected("Phi", layer_norm_eps=1e-5)["rms_norm_eps"] == 1e-5
    gemma3 = corrected("Gemma3Text")
    assert (gemma3["rope_theta"], gemma3["rope_local_base_freq"]) == (1e6, 1e4)


def test_cost_grows_with_the_model_and_shrinks_with_precision() -> None:
    small = Arch.from_config(config_of("Llama", {}).to_dict())
    large = Arch.from_config(config_of("Llama", {"num_hidden_layers": 30}).to_dict())
    costs = [OrtGenai(precision=p).cost(large, 1 << 20) for p in ("fp32", "int8", "int4")]
    assert costs[0].disk_bytes > costs[1].disk_bytes > costs[2].disk_bytes
    assert OrtGenai().cost(small, 1 << 20).ram_bytes < costs[1].ram_bytes


@pytest.mark.usefixtures("genai_in_this_process")
@pytest.mark.parametrize(("precision", "tied"), [("int8", True), ("int4", True), ("int8", False)])
def test_cost_counts_the_embedding_as_it_is_stored(
    precision: Any, tied: bool, tmp_path: Path
) -> None:
    """In fp32, but for one that is tied to a head in int4."""
    keys = {"vocab_size": 8192, "tie_word_embeddings": tied}
    model = model_in(tmp_path / "model", "Llama", keys)
    exporter = OrtGenai(precision=precision)
    exporter.export(tmp_path / "model", tmp_path / "out", Work(MACHINE, Silent(), tmp_path / "s"))
    arch = Arch.from_config(model.config.to_dict(), ignore_keys=model.config.to_dict())
    data = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert 0.8 < exporter.cost(arch, 1 << 20).disk_bytes / data < 1.25


def test_decode_bytes_counts_what_every_step_reads(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(np.zeros(shape, np.float32), name)

    nodes = [
        helper.make_node("Gather", ["looked_up", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "projection"], ["y"]),
        helper.make_node("Gather", ["tied", "ids"], ["z"]),
        helper.make_node("Transpose", ["tied"], ["head"]),
        helper.make_node("Add", ["y", "z"], ["s"]),
        helper.make_node("MatMul", ["s", "head"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 9])],
        [weight("looked_up", 100, 4), weight("projection", 4, 5), weight("tied", 9, 5)],
    )
    onnx.save(helper.make_model(graph), str(tmp_path / "g.onnx"))
    assert decode_bytes(tmp_path / "g.onnx") == 4 * (4 * 5 + 9 * 5)


FINE = {
    "finite": True, "positions": 9, "max_error": 1e-4, "spread": 1.0, "mean_kl": 1e-9,
    "same_choice": 9, "generated": 8, "worst_choice": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "found", "expected"),
    [
        ("fp32", {}, ""),
        ("fp32", {"max_error": 2e-3}, "expected at most 1e-03 in fp32"),
        ("fp32", {"finite": False}, "not finite"),
        ("fp32", {"worst_choice": 0.5}, "chose a token 0.5 logits below"),
        ("int8", {"max_error": 0.3, "mean_kl": 0.005, "worst_choice": 0.2}, ""),
        ("int8", {"max_error": 3.0, "mean_kl": 0.5}, "KL from PyTorch is 0.5 nats"),
        ("int4", {"max_error": 3.0, "mean_kl": 0.5, "worst_choice": 4.0}, ""),
        ("int4", {"finite": False}, "not finite"),
    ],
)
def test_judges_a_trial(precision: Any, found: dict[str, Any], expected: str) -> None:
    problem = OrtGenai(precision=precision)._problem({**FINE, **found})
    assert expected in problem
    assert bool(problem) == bool(expected)


def test_needs_a_tokenizer(tmp_path: Path) -> None:
    model_in(tmp_path / "model", "Llama", {})
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        export(OrtGenai(), tmp_path / "model", tmp_path / "out")


# --- real builds ----------------------------------------------------------------------------------

IN_THIS_PROCESS = pytest.mark.usefixtures("genai_in_this_process")


@IN_THIS_PROCESS
@pytest.mark.slow
@pytest.mark.parametrize("case", RIGHT)
def test_computes_what_pytorch_does(case: str, tmp_path: Path) -> None:
    family, keys = RIGHT[case]
    model = model_in(tmp_path / "model", family, keys)
    exporter = OrtGenai(precision="fp32", logits="all")
    record = export(exporter, tmp_path / "model", tmp_path / "out")
    ids = some_ids(2, 60)
    wanted = logits_of(model, ids)
    with exporter.open(tmp_path / "out", MACHINE) as runner:
        got = [runner.step(part)[0] for part in (ids[:, :40], ids[:, 40:41], ids[:, 41:])]
        np.testing.assert_allclose(np.concatenate(got, axis=1), wanted, atol=1e-4)
        runner.reset()
        one = np.concatenate([runner.step(ids[:1, :7])[0], runner.step(ids[:1, 7:])[0]], axis=1)
        np.testing.assert_allclose(one, wanted[:1], atol=1e-4)
    read = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    tied = model.config.tie_word_embeddings
    read += model.lm_head.weight.numel() if tied else 0
    # A norm's weight may be stored with others, an epsilon or an offset as constants.
    assert abs(record.weight_bytes - 4 * read) <= 0.01 * 4 * read


@IN_THIS_PROCESS
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_precisions(precision: Any, tied: bool, tmp_path: Path) -> None:
    model_in(tmp_path / "model", "Llama", {"tie_word_embeddings": tied})
    exporter = OrtGenai(precision=precision)
    record = export(exporter, tmp_path / "model", tmp_path / "out")
    assert record.notes[0].startswith("tried on 9 positions")
    with exporter.open(tmp_path / "out", MACHINE) as runner:
        logits, seconds = runner.step(some_ids(2, 30))
    assert logits.shape == (2, 1, 320)
    assert logits.dtype == np.float32
    assert seconds > 0


@IN_THIS_PROCESS
@pytest.mark.slow
def test_bfloat16_weights_lose_nothing(tmp_path: Path) -> None:
    keys = RIGHT["gemma2"][1]
    model_in(tmp_path / "model", "Gemma2", keys, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    exporter = OrtGenai(precision="fp32")
    export(exporter, tmp_path / "model", tmp_path / "out")
    ids = some_ids(1, 20)
    with exporter.open(tmp_path / "out", MACHINE) as runner:
        np.testing.assert_allclose(runner.step(ids)[0], logits_of(model, ids)[:, -1:], atol=1e-4)


@pytest.mark.slow
def test_a_directory_for_onnxruntime_genai(tmp_path: Path) -> None:
    """Twice the same bytes without a path in them; both runtimes; past a full cache."""
    model = model_in(tmp_path / "model", "Llama", {"tie_word_embeddings": True})
    exporter = OrtGenai(precision="fp32")
    export(exporter, tmp_path / "model", tmp_path / "out")
    export(exporter, tmp_path / "model", tmp_path / "elsewhere" / "again")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "config.json"} <= set(files)
    assert "generation_config.json" in files
    for name in files:
        first = (tmp_path / "out" / name).read_bytes()
        assert first == (tmp_path / "elsewhere" / "again" / name).read_bytes(), name
        assert str(tmp_path).encode() not in first, name
    ids = some_ids(1, 300)
    wanted = logits_of(model, ids)
    with exporter.open(tmp_path / "out", MACHINE) as runner:
        for at in (slice(0, 250), *(slice(i, i + 1) for i in range(250, 300))):
            got, _ = runner.step(ids[:, at])
            np.testing.assert_allclose(got[:, -1], wanted[:, at.stop - 1], atol=1e-4)
    with OgRunner(tmp_path / "out", MACHINE, capacity=64) as other:
        got, _ = other.step(ids[:, :20])
        np.testing.assert_allclose(got[:, -1], wanted[:, 19], atol=1e-4)
        got, _ = other.step(ids[:, 20:21])
        np.testing.assert_allclose(got[:, -1], wanted[:, 20], atol=1e-4)


@IN_THIS_PROCESS
@pytest.mark.slow
def test_a_wrong_engine_does_not_count(tmp_path: Path) -> None:
    """`check` refuses this one; without it the trial against PyTorch must."""
    model_in(tmp_path / "model", "Llama", {"rope_parameters": LINEAR})
    with pytest.raises(StageError, match="logits are off by"):
        export(OrtGenai(precision="fp32"), tmp_path / "model", tmp_path / "out")


@pytest.mark.slow
def test_a_failed_build_says_why(tmp_path: Path) -> None:
    model_in(tmp_path / "model", "SmolLM3", {"no_rope_layer_interval": 2})
    with pytest.raises(StageError, match="KeyError: 'position_ids'") as caught:
        export(OrtGenai(), tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out-scratch" / "genai-build.log").is_file()
    assert "`onnx`" in caught.value.fix
