"""Writes a checkpoint as a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_tokenizer
from prune_export.errors import MissingExtra, PlanError
from prune_export.exporters._shared.trim import Trim
from prune_export.exporters.gguf.shapes import NAMES, Shapes, rope_factors, rope_of, shapes_of
from prune_export.exporters.gguf.vocabulary import add_vocabulary

Kind = Literal["f32", "f16", "q8_0"]
_FILE_TYPES: Final = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_LARGEST_F16: Final = 65504.0


@dataclass(frozen=True)
class Written:
    """What was written: llama.cpp's architecture, tensors, bytes, and what was left out."""

    file: Path
    architecture: str
    tensors: int
    bytes: int
    note: str


def write_gguf(
    checkpoint: Path,
    file: Path,
    kind: Kind = "f16",
    *,
    keep_zeros: bool = False,
    name: str | None = None,
) -> Written:
    """Writes the checkpoint in a directory as GGUF; matrices as `kind`, vectors as float32.

    Heads and channels that are zero are left out unless `keep_zeros`. The model in it is called
    `name`, as its directory unless given. A file of that name is
    replaced when the new one is whole.

    Raises:
        MissingExtra: the package gguf is not installed.
        PlanError: llama.cpp has no architecture or no tokenizer for this model, or a weight is too
            large for float16.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtra.of("gguf", "gguf", "gguf") from error
    opened = Checkpoint.open(checkpoint)
    config = opened.full_config()
    # Sub-blocks that are zero altogether keep a head or a few channels: llama.cpp leaves the
    # attention's output out where a block has no MLP.
    trim = Trim(opened.arch(config)) if keep_zeros else Trim.of(opened).all_alive()
    shapes = shapes_of(trim, config)
    writer = gguf.GGUFWriter(None, shapes.architecture)
    _describe(writer, gguf, name or checkpoint.resolve().name, config, shapes, trim, kind)
    add_vocabulary(writer, checkpoint, load_tokenizer(checkpoint), int(trim.arch.sizes["vocab"]))
    encoder = _Encoder(opened, trim, shapes, kind)
    factors = rope_factors(rope_of(config), shapes.head_size)
    for name, values in encoder.tensors(factors, empty=True):
        writer.add_tensor_info(
            name, values.shape, values.dtype, values.nbytes, encoder.raw_type(gguf, values)
        )
    partial = file.with_name(f".{file.name}.partial")
    try:
        writer.write_header_to_file(path=partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        count = 0
        for _, values in encoder.tensors(factors):
            writer.write_tensor_data(values)
            count += 1
        writer.close()
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    note = "" if keep_zeros else trim.note()
    return Written(file, shapes.architecture, count, file.stat().st_size, note)


class _Encoder:
    """Gives tensors as they stand in the file: cut, in llama.cpp's order of rows, encoded."""

    def __init__(self, checkpoint: Checkpoint, trim: Trim, shapes: Shapes, kind: Kind) -> None:
        self._checkpoint, self._trim, self._shapes, self._kind = checkpoint, trim, shapes, kind

    def tensors(
        self, factors: np.ndarray | None, *, empty: bool = False
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of each tensor; `empty` reads no weight, only shapes are right."""
        for tensor in self._trim.arch.stored():
            role, _, suffix = tensor.role.partition(".bias")
            suffix = "bias" if tensor.role.endswith(".bias") else "weight"
            name = NAMES[role]
            if tensor.layer is not None:
                name = f"blk.{tensor.layer}.{name}"
            if empty:
                shape = list(self._trim.arch.shape(tensor))
                for dim, positions in self._trim.kept(tensor.name):
                    shape[dim] = len(positions)
                yield f"{name}.{suffix}", self._empty(shape)
                continue
            found = self._trim.cut(tensor.name, self._checkpoint.read(tensor.name)).float().numpy()
            if tensor.layer is not None:
                found = self._shapes.rows_of(tensor.role, tensor.layer, found)
            yield f"{name}.{suffix}", self._encoded(tensor.name, found)
        if factors is not None:
            yield "rope_freqs.weight", factors

    def raw_type(self, gguf: Any, values: np.ndarray) -> Any:
        """How GGUF calls the type of encoded bytes; None for plain numbers."""
        return gguf.GGMLQuantizationType.Q8_0 if values.dtype == np.uint8 else None

    def _target(self, shape: list[int] | tuple[int, ...]) -> Kind:
        if len(shape) < 2:
            return "f32"
        # q8_0 takes 32 numbers of a row together.
        return "f16" if self._kind == "q8_0" and shape[-1] % 32 else self._kind

    def _empty(self, shape: list[int]) -> np.ndarray:
        target = self._target(shape)
        if target == "q8_0":
            return np.broadcast_to(np.uint8(0), (*shape[:-1], shape[-1] // 32 * 34))
        kind = np.float32 if target == "f32" else np.float16
        return np.broadcast_to(kind(0), shape)

    def _encoded(self, name: str, values: np.ndarray) -> np.ndarray:
        target = self._target(values.shape)
        if target == "f32":
            return np.ascontiguousarray(values, np.float32)
        if target == "f16":
            if values.size and float(np.abs(values).max()) > _LARGEST_F16:
                raise PlanError(
                    f"gguf  {name}", "holds a weight that float16 cannot", "write `--type f32`"
                )
            return np.ascontiguousarray(values, np.float16)
        from gguf import GGMLQuantizationType, quants

        quantized: np.ndarray = quants.quantize(values, GGMLQuantizationType.Q8_0)
        return quantized


def _describe(
    writer: Any, gguf: Any, name: str, config: Any, shapes: Shapes, trim: Trim, kind: Kind
) -> None:
    rope = rope_of(config)
    writer.add_name(name)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, _FILE_TYPES[kind])))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(trim.arch.layers)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(trim.arch.sizes["residual"]))
    writer.add_vocab_size(int(trim.arch.sizes["vocab"]))
    for add, sizes in (
        (writer.add_head_count, shapes.heads),
        (writer.add_head_count_kv, shapes.kv_heads),
        (writer.add_feed_forward_length, shapes.channels),
    ):
        add(sizes[0] if len(set(sizes)) == 1 else list(sizes))
    writer.add_key_length(shapes.head_size)
    writer.add_value_length(shapes.head_size)
    writer.add_rope_dimension_count(shapes.head_size)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
