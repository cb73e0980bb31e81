"""Tiny random models of images and text, and an image's inputs for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from prune_export.arch.table import table_for
from prune_export.arch.wrappers import wrappers

IMAGE = 60
"""The token that stands for a part of the image."""

_SMALL: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
_CLIP = {**_SMALL, "image_size": 8, "patch_size": 4}
_QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 1,
    "spatial_merge_size": 2, "in_channels": 3,
}  # fmt: skip
_QWEN35_VISION = {
    **_QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 16,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class _Recipe:
    """What makes a wrapper tiny: its config without the text, and the image's inputs."""

    config: Mapping[str, Any]
    tokens: int = 4
    image: Callable[[], dict[str, torch.Tensor]] | None = None
    text: Mapping[str, Any] | None = None


def _pixels(size: int) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"pixel_values": torch.randn(1, 3, size, size)}


def _patches() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])}


RECIPES: Mapping[str, _Recipe] = {
    "aya_vision": _Recipe({
        "vision_config": {"model_type": "siglip_vision_model", **_CLIP, "vision_use_head": False},
        "downsample_factor": 2, "image_token_index": IMAGE,
    }, 1, _pixels(8)),
    "gemma3": _Recipe({
        "vision_config": {**_CLIP, "vision_use_head": False},
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 61,
        "eoi_token_index": 62,
    }, 4, _pixels(8)),
    "gemma4": _Recipe(
        {
            "vision_config": {
                **_SMALL, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
                "pooling_kernel_size": 2, "position_embedding_size": 16,
            },
            "audio_config": None, "image_token_id": IMAGE, "boi_token_id": 61, "eoi_token_id": 62,
            "video_token_id": 63, "audio_token_id": 59,
        },
        4,
        lambda: {
            "pixel_values": torch.rand(1, 16, 48),
            "image_position_ids": torch.tensor([[[i % 4, i // 4] for i in range(16)]]),
        },
        {"pad_token_id": 0},
    ),
    "internvl": _Recipe({
        "vision_config": {**_CLIP, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    }, 4, _pixels(16)),
    "llama4": _Recipe(
        {
            "vision_config": {
                **_CLIP, "image_size": 16, "intermediate_size": 64, "projector_input_dim": 16,
                "projector_output_dim": 16, "vision_output_dim": 16,
            },
            "image_token_index": IMAGE, "boi_token_index": 61, "eoi_token_index": 62,
        },
        4,
        _pixels(16),
    ),
    "llava": _Recipe({
        "vision_config": {"model_type": "clip_vision_model", **_CLIP, "projection_dim": 16},
        "image_token_index": IMAGE, "vision_feature_layer": -1,
    }, 4, _pixels(8)),
    "llava_next": _Recipe({
        "vision_config": {"model_type": "clip_vision_model", **_CLIP, "projection_dim": 16},
        "image_token_index": IMAGE, "vision_feature_layer": -1,
        "image_grid_pinpoints": [[8, 8]],
    }),
    "llava_onevision": _Recipe({
        "vision_config": {"model_type": "siglip_vision_model", **_CLIP, "vision_use_head": False},
        "image_token_index": IMAGE, "video_token_index": 61, "vision_feature_layer": -1,
        "image_grid_pinpoints": [[8, 8]],
    }),
    "mistral3": _Recipe({
        "vision_config": {"model_type": "pixtral", **_CLIP, "image_size": 16, "head_dim": 8},
        "image_token_index": IMAGE, "spatial_merge_size": 2,
    }, 4, lambda: {**_pixels(16)(), "image_sizes": torch.tensor([[16, 16]])}),
    "qwen2_vl": _Recipe({
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN_TOKENS,
    }, 4, _patches, {"rope_parameters": _MROPE}),
    "qwen2_5_vl": _Recipe({
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 24,
                          "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    }, 4, _patches, {"rope_parameters": _MROPE}),
    "qwen3_5": _Recipe(
        {"vision_config": _QWEN35_VISION, **_QWEN_TOKENS},
        4,
        _patches,
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5}},
    ),
    "qwen3_5_moe": _Recipe(
        {"vision_config": _QWEN35_VISION, **_QWEN_TOKENS},
        4,
        _patches,
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5}},
    ),
    "qwen3_vl": _Recipe({
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 24,
                          "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_QWEN_TOKENS,
    }, 4, _patches, {"rope_parameters": {**_MROPE, "mrope_interleaved": True}, "head_dim": 8}),
    "smolvlm": _Recipe({
        "vision_config": {**_CLIP}, "image_token_id": IMAGE, "scale_factor": 2,
    }, 1, lambda: {"pixel_values": torch.randn(1, 1, 3, 8, 8)}),
}  # fmt: skip


@dataclass(frozen=True)
class TinyWrapper:
    """A tiny model of images and text, and where it is saved."""

    model: Any
    path: Path
    image: Mapping[str, torch.Tensor]
    ids: torch.Tensor


def save_wrapper(name: str, path: Path, **changes: Any) -> TinyWrapper:
    """Saves a tiny random model; `changes` are of its text config."""
    recipe, line = RECIPES[name], wrappers()[name]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    tiny = table_for(line.reads_as or line.text).tiny.config
    text = {"model_type": line.text, **ends, **tiny, **(recipe.text or {}), **changes}
    torch.manual_seed(0)
    tied = {"tie_word_embeddings": bool(changes.get("tie_word_embeddings", line.tied))}
    config = AutoConfig.for_model(name, text_config=text, **recipe.config, **tied)
    family = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    made = getattr(transformers, family[name])(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.2)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    made.save_pretrained(path)
    # As it is read: the layout of fused experts in memory moves the last bits of their products.
    made = type(made).from_pretrained(path, dtype=torch.float32).eval()
    image = dict(recipe.image()) if recipe.image else {}
    ids = torch.tensor([[5, 9, 40, *[IMAGE] * recipe.tokens, 17, 22, 8, 2, 11, 50]])
    if name.startswith("qwen"):
        image["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "gemma4":
        image["mm_token_type_ids"] = (ids == IMAGE).int()
    if name == "gemma3":
        image["token_type_ids"] = (ids == IMAGE).int()
    return TinyWrapper(made, path, image, ids)
