"""Makes onnxruntime-genai's builder write the codes of a quantized checkpoint, exactly.

The builder writes a matrix that already has codes (`qweight`, `scales`, `qzeros`, as its loaders of
quantized models give them) as `MatMulNBits` as it is. So the codes are put beside the weights of
transformers' model; what has no grid is rounded to nearest, as the builder would do. What was
written is read again and compared.

Differs: these are the builder's private parts, of version 0.18 (`OrtGenai.check` insists on it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import as_matrix
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.exporters._shared.nbits import packed_codes, packed_zeros, unpacked
from prune_export.grids import Grid, nearest_grid

_FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Matrices that the builder takes apart; taken apart here, so that each part has its codes."""

_LAYER: Final = re.compile(r"layers\.(\d+)/")


class LostCodesError(Exception):
    """The graph does not hold the weights of a quantized checkpoint as they are."""


def give_codes(model: Any, checkpoint: Checkpoint, grids: Grids, fallback: tuple[int, int]) -> None:
    """Puts codes beside all matrices of a transformers model's blocks.

    `fallback` is the bits and block size of those without a grid.
    """
    arch = checkpoint.arch(checkpoint.full_config().keys())
    for tensor, path in _matrices(model, arch):
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise LostCodesError(f"{tensor.name} is no matrix of its own in this family")
        weight = module.weight.detach()
        grid = grids.read(tensor.name) if tensor.name in grids else None
        if grid is None or tuple(weight.shape) != arch.shape(tensor):
            # Of a sub-block that adds nothing, a few channels may have been kept.
            give_nearest(module, *fallback)
            continue
        stored = as_matrix(tensor, checkpoint.read(tensor.name))
        _give(module, grids.codes(tensor.name, stored, grid), grid)
    for parent in list(model.modules()):
        for name, parts in _FUSED.items():
            if hasattr(getattr(parent, name, None), "qweight"):
                _take_apart(parent, name, parts, model.config)


def give_nearest(module: Any, bits: int, block: int) -> None:
    """Puts codes, rounded to nearest, beside the weights of a linear layer."""
    weight = module.weight.detach()
    grid = nearest_grid(weight, bits, block, symmetric=True)
    _give(module, grid.codes(weight), grid)


def _give(module: Any, codes: torch.Tensor, grid: Grid) -> None:
    module.qweight = packed_codes(codes, grid)
    module.scales, module.qzeros = grid.scales.contiguous(), packed_zeros(grid)
    module.bits, module.group_size, module.g_idx = grid.bits, grid.group_size, None
    module.out_features, module.in_features = codes.shape


def _matrices(model: Any, arch: Arch) -> Iterator[tuple[Tensor, str]]:
    """The matrices of the blocks with the paths of their modules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    from prune_export.calibrate import linears

    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    for tensor in linears(arch):
        if tensor.expert is not None:
            raise LostCodesError(f"{tensor.name} is one of several experts, which are rounded anew")
        yield tensor, str(rename_source_key(tensor.name, rules, [])[0]).rpartition(".")[0]


def _take_apart(parent: Any, name: str, parts: tuple[str, ...], config: Any) -> None:
    whole = getattr(parent, name)
    rows = len(whole.weight)
    sizes = [rows // 2, rows // 2]
    if len(parts) == 3:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        kv = config.num_key_value_heads * (rows // heads)
        sizes = [rows - 2 * kv, kv, kv]
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        own = slice(start, start + size)
        module: Any = nn.Linear(whole.in_features, size, bias=whole.bias is not None, device="meta")
        module.weight = nn.Parameter(whole.weight.detach()[own], requires_grad=False)
        if whole.bias is not None:
            module.bias = nn.Parameter(whole.bias.detach()[own], requires_grad=False)
        module.qweight, module.scales = whole.qweight[own], whole.scales[own]
        module.qzeros = None if whole.qzeros is None else whole.qzeros[own]
        module.bits, module.group_size, module.g_idx = whole.bits, whole.group_size, None
        setattr(parent, part, module)
        start += size
    delattr(parent, name)


def join_codes(q: Any, k: Any, v: Any) -> Any:
    """The codes of queries, keys and values in one matrix, as the builder multiplies them."""
    parts = (q, k, v)
    zeros = [part.qzeros for part in parts]
    return SimpleNamespace(
        qweight=torch.cat([part.qweight for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        qzeros=None if zeros[0] is None else torch.cat(zeros),
        g_idx=None,
        in_features=q.in_features,
        out_features=sum(part.out_features for part in parts),
        bits=q.bits,
        group_size=q.group_size,
    )


def joinable(q: Any, k: Any, v: Any) -> bool:
    """Whether queries, keys and values have codes of one kind."""
    kinds = {(one.bits, one.group_size, one.qzeros is None) for one in (q, k, v)}
    return len(kinds) == 1


def refuse_lost(graph: Path, checkpoint: Checkpoint, grids: Grids) -> int:
    """Counts the matrices of a quantized checkpoint that a graph holds, to the last bit.

    Of blocks of which nothing is in the graph, as they only add zero, nothing is asked.

    Raises:
        LostCodesError: a matrix is not among those that the graph multiplies with.
    """
    arch = checkpoint.arch(checkpoint.full_config().keys())
    held = _multiplied(graph)
    found = 0
    for name in grids:
        tensor = arch.by_name[name]
        grid = grids.read(name)
        stored = as_matrix(tensor, checkpoint.read(name))
        exact = grid.values(grids.codes(name, stored, grid)).numpy()
        if not _holds(held.get(tensor.layer or 0, ()), exact):
            if not exact.any():
                continue
            raise LostCodesError(f"{name} is not in the graph as it is on its grid")
        found += 1
    return found


def _multiplied(graph: Path) -> dict[int, list[np.ndarray]]:
    """The weights float32 `[out, in]` of each block's `MatMulNBits` nodes."""
    import onnx
    from onnx.numpy_helper import to_array

    model = onnx.load(str(graph))
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[int, list[np.ndarray]] = {}
    for node in model.graph.node:
        layer = _LAYER.search(node.name)
        if node.op_type == "MatMulNBits" and layer:
            given = {attribute.name: attribute.i for attribute in node.attribute}
            codes, scales, *zeros = (to_array(values[name]) for name in node.input[1:4] if name)
            matrix = unpacked(codes, scales, zeros[0] if zeros else None, given)
            found.setdefault(int(layer.group(1)), []).append(matrix)
    return found


def _holds(nodes: Sequence[np.ndarray], matrix: np.ndarray) -> bool:
    """Whether the rows of a matrix stand, in runs of neighbours, in those of the nodes."""
    row = 0
    while row < len(matrix):
        runs = (_run(node, matrix[row:]) for node in nodes if node.shape[1] == matrix.shape[1])
        longest = max(runs, default=0)
        if not longest:
            return False
        row += longest
    return True


def _run(node: np.ndarray, rows: np.ndarray) -> int:
    """The most of the first of `rows` that stand one after the other in a node."""
    longest = 0
    for start in np.flatnonzero((node == rows[0]).all(axis=1)):
        count = min(len(node) - int(start), len(rows))
        same = (node[start : start + count] == rows[:count]).all(axis=1)
        longest = max(longest, count if same.all() else int(same.argmin()))
    return longest
