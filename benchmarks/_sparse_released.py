"""Wanda, GBLM and SparseGPT as their authors' codes do it, written again in plain PyTorch.

Those codes are of years ago and want CUDA and old libraries. What is kept of them: every block is
computed twice, first for the statistics of all its matrices and then, pruned, for the next block's
inputs; windows go one by one through running means; GBLM's gradients are the dense model's, each
multiplied by alpha before their sizes are summed over the windows at hand, however many; SparseGPT
goes through columns in blocks of 128, one column at a time. Only half precision is not kept.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ALPHA = 100
COLUMNS, DAMPING = 128, 0.01

Zeros = tuple[int, int]
"""How many of how many neighbours become zero; (0, 0) is half of the weights."""


def prune(
    options: argparse.Namespace, model: Any, ids: torch.Tensor, gradients: Path | None
) -> None:
    """Prunes a transformers model in place."""
    zeros = (0, 0)
    if ":" in options.pattern:
        keep, of = map(int, options.pattern.split(":"))
        zeros = (of - keep, of)
    summed = _gradients(model, ids, gradients) if options.method == "gblm" else {}
    model.requires_grad_(False)
    blocks = model.model.layers
    with torch.inference_mode():
        states, call = _caught(model, blocks[0], ids)
        for layer, block in enumerate(blocks):
            linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            seen = {name: _Seen(options.method == "sparsegpt") for name in linears}
            hooks = [m.register_forward_hook(seen[name].hook) for name, m in linears.items()]
            for window in states:
                block(window[None], **call)
            for hook in hooks:
                hook.remove()
            for name, module in linears.items():
                weight = module.weight.data
                if options.method == "sparsegpt":
                    weight.copy_(_compensated(weight, seen[name].mean, zeros))
                    continue
                score = weight.abs() * seen[name].mean.sqrt()
                if summed:
                    score += weight.abs() * summed[f"{layer}.{name}"]
                weight[_least(score, zeros)] = 0
            for at, window in enumerate(states):
                made = block(window[None], **call)
                states[at] = (made[0] if isinstance(made, tuple) else made)[0]


def _gradients(model: Any, ids: torch.Tensor, file: Path | None) -> dict[str, torch.Tensor]:
    """Sums over windows of |alpha g|, by block and matrix; kept in `file`."""
    if file is not None and file.exists():
        loaded: dict[str, torch.Tensor] = torch.load(file)
        return loaded
    model.requires_grad_(False)
    linears = {
        f"{layer}.{name}": module.weight.requires_grad_()
        for layer, block in enumerate(model.model.layers)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in linears.items()}
    for window in ids:
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
        for name, weight in linears.items():
            assert weight.grad is not None
            sums[name] += (ALPHA * weight.grad).abs()
            weight.grad = None
    if file is not None:
        torch.save(sums, file)
    return sums


class _Stop(Exception):
    pass


def _caught(model: Any, first: nn.Module, ids: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """Each window's states before the first block, and what else a block is called with."""
    states, calls = [], []

    def catch(_: nn.Module, args: tuple[torch.Tensor, ...], more: dict[str, Any]) -> None:
        states.append(args[0][0] if args else more.pop("hidden_states")[0])
        calls.append(more)
        raise _Stop

    hook = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in ids:
        try:
            model(window[None], use_cache=False)
        except _Stop:
            continue
    hook.remove()
    return states, calls[0]


class _Seen:
    """A running mean over windows: of sums of squares `[in]`, or of sums of products `[in, in]`."""

    def __init__(self, products: bool) -> None:
        self.products, self.windows = products, 0
        self.mean = torch.zeros(())

    def hook(self, _: nn.Module, args: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        del made
        rows = args[0].reshape(-1, args[0].shape[-1])
        own = 2 * rows.T @ rows if self.products else rows.norm(dim=0) ** 2
        self.mean = self.mean * (self.windows / (self.windows + 1)) + own / (self.windows + 1)
        self.windows += 1


def _least(score: torch.Tensor, zeros: Zeros) -> torch.Tensor:
    count, of = zeros if zeros[1] else (score.shape[1] // 2, score.shape[1])
    groups = score.reshape(-1, of)
    least = groups.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, least, True).view_as(score)


def _compensated(weight: torch.Tensor, gram: torch.Tensor, zeros: Zeros) -> torch.Tensor:
    weight, (count, of) = weight.clone(), zeros
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        own, factor = weight[:, start:stop], upper[start:stop, start:stop]
        worth, errors = factor.diagonal() ** 2, torch.zeros_like(own)
        mask = torch.zeros_like(own, dtype=torch.bool)
        if not of:
            score = own**2 / worth
            mask = score <= score.flatten().kthvalue(score.numel() // 2).values
        for j in range(stop - start):
            if of and j % of == 0:
                score = own[:, j : j + of] ** 2 / worth[j : j + of]
                mask.scatter_(1, j + score.topk(count, dim=1, largest=False).indices, True)
            errors[:, j] = own[:, j] * mask[:, j] / factor[j, j]
            own[:, j:] -= errors[:, j, None] * factor[j, j:]
            own[:, j].masked_fill_(mask[:, j], 0)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def job(
    options: argparse.Namespace, source: Path, ids: torch.Tensor, measured: Callable[..., Any]
) -> dict[str, Any]:
    """Prunes the model at `source`, and saves it where our own results go."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    draw = options.work / f"gradients-{options.draw}.pt"
    file = draw if options.draw else None
    taken: dict[str, Any] = measured(lambda: prune(options, model, ids, file))
    weights = {n: v for n, v in model.state_dict().items() if "lm_head" not in n}
    out = options.work / "out"
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", out)
    matrices = [value for name, value in weights.items() if name.endswith("proj.weight")]
    zeros = sum(int((value == 0).sum()) for value in matrices)
    return taken | {"sparsity": zeros / sum(value.numel() for value in matrices)}
