"""A model of images and text is cut in its language model; the rest stays as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.arch.wrappers import wrappers
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_config, load_model
from prune_export.errors import CheckpointError, PlanError, UnsupportedArch
from prune_export.surgery import Become, Drop, Edit, Keep, Untie, rewrite
from prune_export.training.full_weights import trained_tensors, whole_model
from tests.checkpoint.tiny_wrappers import IMAGE, RECIPES, TinyWrapper, save_wrapper

TEXT = torch.tensor([[5, 9, 40, 3, 17, 22, 8, 2, 11, 50]])
WITH_IMAGE = [name for name, recipe in RECIPES.items() if recipe.image]
RAM = 1 << 30

Save = Callable[..., TinyWrapper]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    made: dict[str, TinyWrapper] = {}

    def wrapper(name: str, **changes: Any) -> TinyWrapper:
        key = repr((name, changes))
        if key not in made:
            made[key] = save_wrapper(name, tmp_path_factory.mktemp(name), **changes)
            (made[key].path / "preprocessor_config.json").write_text('{"size": 8}\n')
        return made[key]

    return wrapper


def cut(tiny: TinyWrapper, out: Path, *edits: Edit) -> Checkpoint:
    source = Checkpoint.open(tiny.path)
    return rewrite(source, source.arch(), edits, out, ram_bytes=RAM)


def load_whole(path: Path) -> Any:
    config = AutoConfig.from_pretrained(path)
    own = getattr(transformers, config.architectures[0])
    model, report = own.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@contextmanager
def skipped(model: Any, layers: Collection[int]) -> Iterator[None]:
    """Makes blocks of the language model return their input."""

    def unchanged(_module: object, inputs: Any, named: Any, output: Any) -> Any:
        states = inputs[0] if inputs else named["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    text = model.get_decoder()
    text = getattr(text, "model", text)
    hooks = [text.layers[i].register_forward_hook(unchanged, with_kwargs=True) for i in layers]
    yield
    for hook in hooks:
        hook.remove()


def hashes(path: Path) -> dict[str, str]:
    """The stored tensors' bytes, by name."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return {
            name: hashlib.sha256(
                file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for name in file.keys()  # noqa: SIM118
        }


def test_every_wrapper_whose_text_has_a_table_is_proven_here() -> None:
    described = {
        name for name, line in wrappers().items() if (line.reads_as or line.text) in tables()
    }
    assert described == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_language_model_is_read_as_a_model_of_its_own(save: Save, name: str) -> None:
    tiny = save(name)
    opened = Checkpoint.open(tiny.path)
    assert opened.wrapped is not None
    arch = opened.arch()
    stored = hashes(tiny.path)
    assert {opened.wrapped.stored_name(key) for key in opened.entries} | set(
        opened.wrapped.carried
    ) == stored.keys()
    assert not any("visi" in name or "project" in name for name in opened.entries)
    model = load_model(tiny.path, dtype=torch.float32).eval()
    assert sum(one.numel() for one in model.parameters()) == arch.parameters()
    assert type(load_config(tiny.path)) is type(model.config)
    with torch.no_grad():
        alone, within = model(TEXT).logits, tiny.model(TEXT).logits
    # Of a mixture, the loaded model sums the experts in another order.
    assert torch.equal(alone, within)


@pytest.mark.parametrize("name", RECIPES)
def test_a_depth_cut_carries_the_rest_and_sees_images_as_before(
    save: Save, name: str, tmp_path: Path
) -> None:
    tiny = save(name)
    made = cut(tiny, tmp_path, Drop((2, 4)))
    assert (tmp_path / "preprocessor_config.json").read_bytes() == b'{"size": 8}\n'
    before, after = hashes(tiny.path), hashes(tmp_path)
    assert made.wrapped is not None
    assert made.wrapped.carried
    assert {key: after[key] for key in made.wrapped.carried} == {
        key: before[key]
        for key in Checkpoint.open(tiny.path).wrapped.carried  # type: ignore[union-attr]
    }
    whole, cut_config = (
        json.loads((path / "config.json").read_text()) for path in (tiny.path, tmp_path)
    )
    assert whole.pop("text_config") != cut_config.pop("text_config")
    assert cut_config == whole
    model = load_whole(tmp_path)
    asked = {"input_ids": tiny.ids, **tiny.image} if tiny.image else {"input_ids": TEXT}
    with torch.no_grad(), skipped(tiny.model, (2, 4)):
        expected = tiny.model(**asked).logits
        blank = tiny.model(tiny.ids.masked_fill(tiny.ids == IMAGE, 3)).logits
    with torch.no_grad():
        torch.testing.assert_close(model(**asked).logits, expected, atol=1e-5, rtol=1e-5)
    if tiny.image:
        assert (expected - blank)[0, -1].abs().max() > 1e-2, "the image is seen"
        said = model.generate(
            **asked, max_new_tokens=4, do_sample=False, pad_token_id=0, min_new_tokens=4
        )
        assert said.shape[1] == tiny.ids.shape[1] + 4


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_a_width_cut_is_written_into_the_text_config(save: Save, name: str, tmp_path: Path) -> None:
    tiny = save(name)
    source = Checkpoint.open(tiny.path)
    arch = source.arch()
    made = cut(
        tiny, tmp_path, *(Keep(f"mlp.{i}", tuple(range(0, 48, 2))) for i in range(arch.layers))
    )
    assert made.arch().sizes["mlp.0"] == 24
    assert load_whole(tmp_path).config.text_config.intermediate_size == 24
    with torch.no_grad():
        load_model(tmp_path)(TEXT)


def test_a_head_of_its_own_is_said_to_the_whole_model(save: Save, tmp_path: Path) -> None:
    tiny = save("gemma3")
    cut(tiny, tmp_path, Untie("lm_head.weight"))
    model = load_whole(tmp_path)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(TEXT).logits, tiny.model(TEXT).logits)


def test_what_meets_the_other_parts_is_not_cut(save: Save, tmp_path: Path) -> None:
    tiny = save("qwen3_vl")
    arch = Checkpoint.open(tiny.path).arch()
    with pytest.raises(PlanError, match=r"axis residual\n.*other parts of this qwen3_vl model"):
        arch.resized("residual", 16)
    with pytest.raises(PlanError, match="cannot be that of the language model in a qwen3_vl"):
        cut(tiny, tmp_path, Become("sliced_qwen3"))
    with pytest.raises(PlanError, match=r"got \[1\].*first 2 blocks.*\n.*protect_first: 2"):
        arch.without([1, 3])
    with pytest.raises(PlanError, match=r"got \[0\]"):
        arch.without([2]).without([0])
    assert arch.without([2]).layers == arch.layers - 1


def test_names_of_todays_and_of_older_releases_are_kept(save: Save, tmp_path: Path) -> None:
    """transformers saves the older names; a file with those that it has in memory is read too."""
    from safetensors.torch import save_file

    tiny = save("gemma3")
    new, out = tmp_path / "new", tmp_path / "out"
    new.mkdir()
    (new / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    tensors = {
        name: value.contiguous()
        for name, value in tiny.model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    opened = Checkpoint.open(new)
    assert opened.wrapped is not None
    assert opened.wrapped.prefix == "model.language_model"
    rewrite(opened, opened.arch(), [Drop((1,))], out, ram_bytes=RAM)
    assert "model.language_model.layers.4.self_attn.q_proj.weight" in hashes(out)
    load_whole(out)


def test_an_old_flat_config_is_read_and_written_flat(save: Save, tmp_path: Path) -> None:
    tiny = save("qwen2_5_vl")
    flat, out = tmp_path / "flat", tmp_path / "out"
    flat.mkdir()
    config = json.loads((tiny.path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (flat / "config.json").write_text(json.dumps({**text, **config}))
    (flat / "model.safetensors").symlink_to(tiny.path / "model.safetensors")
    opened = Checkpoint.open(flat)
    rewrite(opened, opened.arch(), [Drop((0,))], out, ram_bytes=RAM)
    written = json.loads((out / "config.json").read_text())
    assert "text_config" not in written
    assert written["num_hidden_layers"] == 5
    assert written["rope_scaling"] == {"type": "mrope", "mrope_section": [1, 1, 2]}
    with torch.no_grad(), skipped(tiny.model, (0,)):
        expected = tiny.model(tiny.ids, **tiny.image).logits
    with torch.no_grad():
        found = load_whole(out)(tiny.ids, **tiny.image).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_what_is_not_described_is_refused(save: Save, tmp_path: Path) -> None:
    tiny = save("llava")
    config = json.loads((tiny.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "video_llava"}))
    opened = Checkpoint.open(tmp_path, weights=False)
    with pytest.raises(UnsupportedArch, match="wraps a language model"):
        opened.arch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    save_file({"vision.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"language_model.layers.0\n.*keeps the blocks"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("odd", [[], {"a": 1}, 3])
def test_odd_text_configs_are_refused(save: Save, tmp_path: Path, name: str, odd: Any) -> None:
    config = json.loads((save(name).path / "config.json").read_text())
    for text in (odd, {**config["text_config"], "model_type": odd}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
        with pytest.raises((CheckpointError, UnsupportedArch)):
            Checkpoint.open(tmp_path, weights=False).arch()


def test_a_config_alone_is_planned(save: Save, tmp_path: Path) -> None:
    tiny = save("mistral3")
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    arch = Checkpoint.open(tmp_path, weights=False).arch()
    assert isinstance(arch, Arch)
    assert arch.within is not None
    assert arch.within.wrapper == "mistral3"


RELEASED: dict[str, tuple[float, dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        7.62,
        {
            "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653,
            "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
            "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
            "intermediate_size": 18944, "max_position_embeddings": 128000,
            "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
            "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
    ),
    "Qwen/Qwen3-VL-4B-Instruct": (
        4.02,
        {
            "model_type": "qwen3_vl", "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen3_vl_text", "attention_bias": False, "head_dim": 128,
                "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728,
                "max_position_embeddings": 262144, "num_attention_heads": 32,
                "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                                 "rope_type": "default"},
                "rope_theta": 5000000, "tie_word_embeddings": True, "vocab_size": 151936,
            },
            "vision_config": {"deepstack_visual_indexes": [5, 11, 17], "out_hidden_size": 2560},
        },
    ),
    "google/gemma-3-4b-it": (
        3.88,
        {
            "model_type": "gemma3", "mm_tokens_per_image": 256, "image_token_index": 262144,
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
        },
    ),
    "llava-hf/llava-1.5-7b-hf": (
        6.74,
        {
            "model_type": "llava", "image_token_index": 32000, "torch_dtype": "float16",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama",
                "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
            },
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024},
        },
    ),
}  # fmt: skip
"""Configs as they were released, and the billions of parameters of the language model in them."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_understood(name: str, tmp_path: Path) -> None:
    billions, config = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = Checkpoint.open(tmp_path, weights=False)
    arch = opened.arch()
    assert arch.parameters() == pytest.approx(billions * 1e9, rel=0.01)
    assert opened.wrapped is not None
    cut = arch.without([arch.layers - 2]).to_config(opened.config)
    whole = opened.wrapped.whole_config(opened.config, cut)
    text = whole.get("text_config", whole)
    assert text["num_hidden_layers"] == arch.layers - 1
    assert text["hidden_size"] if "hidden_size" in text else name.startswith("llava")
    assert whole["vision_config"] == config["vision_config"]
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(json.dumps(whole))
    assert Checkpoint.open(again, weights=False).arch().layers == arch.layers - 1


@pytest.mark.parametrize("name", RECIPES)
def test_all_of_its_weights_can_be_trained(save: Save, name: str) -> None:
    source = Checkpoint.open(save(name).path)
    names = [tensor.name for tensor in trained_tensors(source.arch(), embeddings=True)]
    whole = whole_model(
        source, names, device="cpu", dtype=torch.float32, gradient_checkpointing=False,
        keep_zeros=(),
    )  # fmt: skip
    found = {edit.tensor: edit.value() for edit in whole.edits(source, ())}
    assert found.keys() == set(names)
    assert all(torch.equal(value, source.read(one)) for one, value in found.items())
