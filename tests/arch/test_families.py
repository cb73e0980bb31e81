"""Every table in families/ against transformers: a new file is tested here without an edit."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, Tiny, headers, logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.errors import PlanError

VARIANTS = [
    pytest.param(model_type, changes, id=f"{model_type}-{name}")
    for model_type, table in sorted(tables().items())
    for name, changes in {"plain": {}, **table.tiny.variants}.items()
]
DROPS = [(1,), (0, 2, 4), (0, 1, 3, 4, 5), (4, 5)]


def cut(tiny: Tiny, layers: Collection[int], base: Mapping[str, Any], out: Path) -> PreTrainedModel:
    """Cuts files by what Arch says and loads the result as a stranger would."""
    arch, source = tiny.arch.without(layers), load_file(tiny.path / "model.safetensors")
    names = tiny.arch.origin(tiny.arch.kept(layers))
    out.mkdir()
    save_file(
        {new: source[old] for new, old in names.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(arch.to_config(base)))
    assert {tensor.name: arch.shape(tensor) for tensor in arch.stored()} == headers(out)
    model, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(model) is type(tiny.model)
    return model.eval()


def bypass(model: PreTrainedModel, blocks: str, layers: Collection[int]) -> None:
    """Makes the blocks return their input; nothing else of the model or its config changes."""

    def unchanged(_module: object, inputs: Any, named: Any, output: Any) -> Any:
        states = inputs[0] if inputs else named["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for layer in layers:
        model.get_submodule(f"{blocks}.{layer}").register_forward_hook(unchanged, with_kwargs=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_names_and_shapes_are_those_on_disk(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any], tied: bool
) -> None:
    made = tiny(model_type, **changes, tie_word_embeddings=tied)
    arch = made.arch
    assert {tensor.name: arch.shape(tensor) for tensor in arch.stored()} == headers(made.path)
    assert arch.parameters() == sum(parameter.numel() for parameter in made.model.parameters())
    assert type(made.model).__name__ in arch.table.architectures
    assert any(tensor.tied_to for tensor in arch.tensors) is tied


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_module_paths_exist(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    table = made.arch.table
    assert len(made.model.get_submodule(table.blocks)) == made.arch.layers
    assert table.final_norm
    norm = getattr(
        made.model.get_submodule(table.final_norm.rpartition(".")[0]),
        table.final_norm.rpartition(".")[2],
    )
    assert (norm is None) is (made.arch.final_norm is None)
    for path in table.embeddings:
        parent, _, name = path.rpartition(".")
        assert hasattr(made.model.get_submodule(parent), name)


@pytest.mark.parametrize("layers", DROPS, ids=str)
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_depth_cut_computes_as_the_model_that_skips_those_blocks(
    tiny: Callable[..., Tiny],
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
    layers: tuple[int, ...],
) -> None:
    made = tiny(model_type, **changes)
    whole = made.logits()
    smaller = cut(made, layers, made.full, tmp_path / "cut")
    bypass(made.model, made.arch.table.blocks, layers)
    expected = made.logits()
    assert (expected - whole).abs().max() > 1e-2
    torch.testing.assert_close(logits(smaller), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_cut_model_generates_the_same_with_and_without_cache(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    smaller = cut(made, DROPS[1], made.full, tmp_path / "cut")
    asked = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(PROMPT),
        "pad_token_id": 0,
    }
    cached = smaller.generate(PROMPT, use_cache=True, **asked)
    assert cached.shape == (2, PROMPT.shape[1] + 8)
    assert torch.equal(cached, smaller.generate(PROMPT, use_cache=False, **asked))


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_sparse_file_gives_the_same_cut_as_a_full_one(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    sparse = {"model_type": model_type, **made.arch.table.tiny.config, **changes}
    sparse.pop(made.arch.table.layers)
    sparse[made.arch.table.layers] = made.arch.layers
    written = made.arch.without(DROPS[1]).to_config(sparse)
    assert set(made.arch.table.config.derives).isdisjoint(written)
    full = AutoConfig.for_model(**made.arch.without(DROPS[1]).to_config(made.full)).to_dict()
    loaded = AutoConfig.for_model(**written).to_dict()
    for key in (*made.arch.table.depth_keys(), "rope_parameters"):
        assert loaded.get(key) == full.get(key), key


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_nothing_is_written_where_nothing_is_cut(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    raw = json.loads((made.path / "config.json").read_text())
    assert made.arch.without(()).to_config(raw) == raw
    assert made.arch.to_config(made.full) == made.full


@pytest.mark.parametrize(
    "name", ["mlp", "moe", "expert", "kv", "group", "dim", "vocab", "positions", "residual"]
)
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_width_cut_is_said_so_that_transformers_builds_it_or_refused(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any], name: str
) -> None:
    made = tiny(model_type, **changes)
    smaller = made.arch
    axes = [
        axis for axis in smaller.sizes if axis.split(".")[0] == name and smaller.sizes[axis] > 1
    ]
    if not axes:
        return
    for axis in axes:
        if axis in smaller.sizes:
            smaller = smaller.resized(axis, smaller.sizes[axis] // 2)
    try:
        config = smaller.to_config(made.full)
    except PlanError as refused:
        assert name in UNSAID[model_type], refused
        return
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert {parameter for parameter in model.state_dict()}
    assert smaller.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert Arch.from_config(AutoConfig.for_model(**config).to_dict()).sizes == smaller.sizes


# Axes that a stock config of the family cannot resize alone.
HEADLESS = {"kv", "dim", "residual"}
UNSAID = {"gpt2": HEADLESS, "opt": HEADLESS, "gpt_neox": HEADLESS, "phi": HEADLESS}
