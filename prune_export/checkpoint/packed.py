"""Dequantizes checkpoints whose weights are stored as 8-bit or 4-bit floats with scales.

    fp8      a weight F8, NAME, and NAME_scale_inv: one scale, or one for each block of the matrix
             (DeepSeek-V3, Qwen3-FP8, Ministral 3)
    mxfp4    NAME_blocks U8 and NAME_scales U8: 32 values of 4 bits share a power of two (gpt_oss)

Both are read exactly as transformers reads them on a CPU, one tensor at a time. Other formats are
refused with what undoes them.

Source: OCP Microscaling Formats (MX) v1.0, 5.3 for the values of 4 bits; transformers,
`integrations/finegrained_fp8.py` and `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prune_export.checkpoint.config import read_json
from prune_export.checkpoint.header import TORCH, Entry
from prune_export.checkpoint.reader import Checkpoint
from prune_export.checkpoint.stored import stored_entries
from prune_export.checkpoint.wrapped import unwrap
from prune_export.checkpoint.writer import SHARD_BYTES, Planned, write_checkpoint
from prune_export.errors import CheckpointError
from prune_export.progress import Progress
from prune_export.system.files import is_regular

if TYPE_CHECKING:
    import torch

KEY: Final = "quantization_config"
_PIECE_BYTES: Final = 64 << 20
_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What three bits of a 4-bit float mean; the fourth one is the sign."""
_SCALE: Final = "_scale_inv"
_NOT_WEIGHTS: Final = (".activation_scale", ".input_scale", ".k_scale", ".v_scale")
"""Scales of what modules are given, which computing in floats has no use for."""

_START: Final = "start from the unquantized model"
_UNDO: Final[Mapping[str, str]] = {
    "bitsandbytes": "undo it where you can load it: `AutoModelForCausalLM.from_pretrained(MODEL)"
    ".dequantize().save_pretrained(OUT)` with transformers; or " + _START,
    "compressed-tensors": "undo it where you can load it: `AutoModelForCausalLM.from_pretrained("
    "MODEL, quantization_config=CompressedTensorsConfig(dequantize=True)).save_pretrained(OUT)` "
    "with transformers; or " + _START,
}


@dataclass(frozen=True)
class Packed:
    """How the weights of a model directory are packed, and its config without that.

    `block` is the size of fp8 blocks `(out, in)` that share a scale, None where config.json names
    none.
    """

    path: Path
    method: str
    config: Mapping[str, Any]
    block: tuple[int, int] | None = None

    @property
    def dtype(self) -> str:
        """The dtype of the dequantized weights: what config.json says, else bfloat16."""
        text = self.config.get("text_config")
        nested = text if isinstance(text, dict) else {}
        for said in (self.config, nested):
            for key in ("dtype", "torch_dtype"):
                name = next((one for one, torch in TORCH.items() if torch == said.get(key)), None)
                if name in ("F32", "F16", "BF16"):
                    return name
        return "BF16"

    def source(self) -> Checkpoint:
        """The directory's tensors as they are stored, unchecked.

        Raises:
            CheckpointError: there are none, or the files are broken or unsafe.
        """
        return Checkpoint(self.path, self.config, stored_entries(self.path))

    def alone(self) -> Checkpoint:
        """The model's config as a checkpoint without weights, to plan with."""
        config, wrapped = unwrap(dict(self.config), self.path)
        return Checkpoint(self.path, config, {}, wrapped)


def packed_in(path: Path) -> Packed | None:
    """Looks how the weights of a model directory are packed; None where they are plain.

    Raises:
        CheckpointError: in a way that is not read here, with what undoes it.
    """
    file = path / "config.json"
    if not is_regular(file):
        return None
    config = read_json(file)
    how = config.pop(KEY, None)
    if not how:
        return None
    method = str(how.get("quant_method")) if isinstance(how, dict) else "unknown method"
    if method not in ("fp8", "mxfp4") or not isinstance(how, dict):
        raise CheckpointError(
            f"{file}  {KEY}",
            f"the weights are quantized ({method}), expected plain floats, fp8 or mxfp4",
            _UNDO.get(method, f"{_START}; quantize at export, after the pruning"),
        )
    block = how.get("weight_block_size")
    if block is not None and (
        not isinstance(block, list) or len(block) != 2 or any(not _natural(one) for one in block)
    ):
        raise CheckpointError(
            f"{file}  {KEY}.weight_block_size", f"got {block!r:.60}, expected two sizes", _START
        )
    return Packed(path, method, config, (block[0], block[1]) if block else None)


def import_packed(
    packed: Packed,
    out: Path,
    progress: Progress | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Writes a packed model as plain floats; what is not packed is copied byte for byte.

    Raises:
        CheckpointError: a weight and its scales do not belong together.
    """
    source = packed.source()
    unpack = _fp8 if packed.method == "fp8" else _mxfp4
    planned = list(unpack(source, packed))
    return write_checkpoint(
        out,
        packed.config,
        planned,
        side_files=source.side_files(),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def _fp8(source: Checkpoint, packed: Packed) -> Iterator[Planned]:
    for name, entry in source.entries.items():
        if name.endswith((_SCALE, *_NOT_WEIGHTS)):
            continue
        scale = source.entries.get(f"{name}{_SCALE}")
        if scale is None and not entry.dtype.startswith("F8"):
            yield Planned(name, entry.dtype, entry.shape, entry)
            continue
        if scale is None or entry.dtype != "F8_E4M3" or not 1 <= len(entry.shape) <= 3:
            raise CheckpointError(
                f"{source.path}  {name}",
                f"is {entry.dtype} {list(entry.shape)} {'with' if scale else 'without'} "
                f"{name}{_SCALE}, expected F8_E4M3 with scales",
                _START,
            )
        block = _block(source, name, entry, scale, packed.block)
        content = partial(_fp8_rows, source, name, block, packed.dtype)
        yield Planned(name, packed.dtype, entry.shape, content)


def _block(
    source: Checkpoint, name: str, entry: Entry, scale: Entry, said: tuple[int, int] | None
) -> tuple[int, int]:
    """The size of the blocks that share a scale, as config.json says it or as the scales divide."""
    rows, columns = entry.shape[-2] if len(entry.shape) > 1 else 1, entry.shape[-1]
    count = tuple(scale.shape[-2:]) if len(scale.shape) > 1 else (1, 1)
    if said and len(entry.shape) == 2 and count == (-(-rows // said[0]), -(-columns // said[1])):
        return said
    plain = len(scale.shape) > 1 or scale.shape in ((), (1,))
    if len(entry.shape) == 3:  # a matrix for each expert, and so are its scales
        plain = len(scale.shape) == 3 and scale.shape[0] == entry.shape[0]
    if plain and not rows % count[0] and not columns % count[1]:
        return rows // count[0], columns // count[1]
    raise CheckpointError(
        f"{source.path}  {name}{_SCALE}",
        f"got scales {list(scale.shape)} for a weight {list(entry.shape)}, in blocks of {said}",
        "fetch the model again, or " + _START,
    )


def _fp8_rows(
    source: Checkpoint, name: str, block: tuple[int, int], dtype: str
) -> Iterator[torch.Tensor]:
    """The weight in pieces of whole blocks of rows, each value times its block's scale."""
    import torch

    entry = source.entries[name]
    scales = _as_floats(source.read(f"{name}{_SCALE}"))
    if len(entry.shape) != 2:
        whole = source.read(name).float()
        flat = whole.reshape(-1, *whole.shape[-2:]) if whole.dim() > 1 else whole[None, None]
        each = scales.reshape(len(flat), -1, scales.shape[-1] if scales.dim() > 1 else 1)
        parts = [_times(one, own, block) for one, own in zip(flat, each, strict=True)]
        yield torch.stack(parts).reshape(entry.shape).to(getattr(torch, TORCH[dtype]))
        return
    scales = scales.reshape(-1, scales.shape[-1]) if scales.dim() > 1 else scales.reshape(1, 1)
    rows, columns = entry.shape
    step = max(1, _PIECE_BYTES // 4 // max(1, columns) // block[0])
    for first in range(0, len(scales), step):
        start, stop = first * block[0], min(rows, (first + step) * block[0])
        piece = source.read_rows(name, start, stop).float()
        made = _times(piece, scales[first : first + step], block)
        yield made.to(getattr(torch, TORCH[dtype]))


def _times(piece: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`[rows, columns]` times `scales`, one for each block."""
    across = scales.repeat_interleave(block[1], dim=1)[:, : piece.shape[1]]
    for number, own in enumerate(across):
        piece[number * block[0] : (number + 1) * block[0]] *= own
    return piece


def _as_floats(scales: torch.Tensor) -> torch.Tensor:
    import torch

    if scales.dtype == torch.uint8:  # exponents of 2
        return (scales.float() - 127.0).exp2()
    return scales.float()


def _mxfp4(source: Checkpoint, packed: Packed) -> Iterator[Planned]:
    for name, entry in source.entries.items():
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in source.entries:
            continue
        if not name.endswith("_blocks"):
            yield Planned(name, entry.dtype, entry.shape, entry)
            continue
        whole = name.removesuffix("_blocks")
        scale = source.entries.get(f"{whole}_scales")
        sound = len(entry.shape) == 4 and entry.shape[3] == 16 and entry.dtype == "U8"
        if scale is None or not sound or (scale.dtype, scale.shape) != ("U8", entry.shape[:3]):
            raise CheckpointError(
                f"{source.path}  {name}",
                f"is {entry.dtype} {list(entry.shape)} with scales "
                f"{list(scale.shape) if scale else 'missing'}, expected U8 [experts, out, groups, "
                "16] and scales U8 [experts, out, groups]",
                _START,
            )
        experts, outputs, groups, _ = entry.shape
        shape = (experts, groups * 32, outputs)
        make: Callable[[], Iterator[torch.Tensor]] = partial(
            _mxfp4_experts, source, whole, packed.dtype
        )
        yield Planned(whole, packed.dtype, shape, make)


def _mxfp4_experts(source: Checkpoint, whole: str, dtype: str) -> Iterator[torch.Tensor]:
    """The experts one by one, `[in, out]` each: 4-bit floats times their group's power of two."""
    import torch

    values = torch.tensor((*_FP4, *(-one for one in _FP4)), dtype=getattr(torch, TORCH[dtype]))
    for expert in range(source.entries[f"{whole}_blocks"].shape[0]):
        blocks = source.read_rows(f"{whole}_blocks", expert, expert + 1)[0]
        powers = source.read_rows(f"{whole}_scales", expert, expert + 1)[0].int() - 127
        pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)  # [out, groups, 16, 2]
        made = torch.ldexp(values[pairs.flatten(2).int()], powers[..., None]).to(values.dtype)
        yield made.flatten(1).T[None]


def _natural(one: object) -> bool:
    return type(one) is int and 0 < one < 1 << 20
