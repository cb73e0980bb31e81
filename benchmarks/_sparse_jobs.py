"""The pieces of sparse_quality.py, each a process of its own, of our Python or the peer's."""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _measured import Peak, measured

BATCH = 4
"""Windows at a time, for everyone: the 2,048 tokens that our passes take."""


def _tokens(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from prune_export.calibrate import token_set
    from prune_export.recipe import LocalText

    found = {}
    for name, samples in (("calibration", options.samples), ("evaluation", options.windows)):
        source = LocalText(files=(f"{name}.jsonl",), samples=samples, length=options.length)
        made = token_set(source, options.model, options.data)
        torch.save(made.ids, options.work / f"{name}.pt")
        found[name] = {"windows": made.samples, "length": made.length, "hash": made.fingerprint}
    for draw in range(1, options.draws + 1):
        source = LocalText(
            files=("calibration.jsonl",), samples=options.samples, length=options.length, seed=draw
        )
        torch.save(token_set(source, options.model, options.data).ids, _drawn(options, draw))
    return found


def _drawn(options: argparse.Namespace, draw: int) -> Path:
    return Path(options.work, f"calibration-{draw}.pt")


def _calibration(options: argparse.Namespace) -> Any:
    """`[windows, length]`, in the order of this shuffle, or other ones of this draw."""
    import torch

    if options.draw:
        return torch.load(_drawn(options, options.draw))
    ids = torch.load(options.work / "calibration.pt")
    if not options.shuffle:
        return ids
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(options.shuffle))]


def _model(options: argparse.Namespace) -> Path:
    """The dense model; each jitter of it is written once."""
    if not options.jitter:
        return Path(options.model)
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(options.work, f"model-{options.jitter}")
    if not (folder / "model.safetensors").exists():
        random = torch.Generator().manual_seed(options.jitter)
        tensors = load_file(options.model / "model.safetensors")
        for tensor in tensors.values():
            tensor *= 1 + 1e-6 * torch.randn(tensor.shape, generator=random)
        for file in options.model.glob("*.json"):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _forward(options: argparse.Namespace) -> dict[str, Any]:
    """One plain forward pass of transformers' decoder, no head, weights loaded: the floor."""
    plain = _plain(options)
    return {"rounds": [measured(plain) for _ in range(options.rounds)]}


def _plain(options: argparse.Namespace) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = torch.load(options.work / "calibration.pt")

    def plain() -> None:
        with torch.inference_mode():
            for start in range(0, len(ids), BATCH):
                model.base_model(ids[start : start + BATCH], use_cache=False)

    model.base_model(ids[:1])  # warm up
    return plain


def _alternating(options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of a pruning and of the floor, in turns; the first pair warms up."""
    plain, pairs = _plain(options), []
    for _ in range(1 + options.rounds):
        floor = measured(plain)["processor_seconds"]
        pairs.append((_ours(options)["processor_seconds"], floor))
        shutil.rmtree(options.work / "out")
    pairs = pairs[1:]
    return {"pairs": pairs, "forwards": statistics.median(own / floor for own, floor in pairs)}


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    import transformers.modeling_utils  # noqa: F401

    from prune_export import registry
    from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
    from prune_export.checkpoint import Checkpoint
    from prune_export.machine import Machine
    from prune_export.sparsity.nm import Nm
    from prune_export.surgery import rewrite

    cls = registry.find("methods", options.method)
    pattern: dict[str, Any] = {"sparsity": 0.5}
    if ":" in options.pattern:
        keep, of = map(int, options.pattern.split(":"))
        pattern = {"nm": Nm(keep, of)}
    if options.order == "permuted":
        pattern["permute"] = True
    elif options.method != "magnitude":
        pattern["order"] = options.order
    method = cls(**pattern)
    tokens, model = TokenSet.of(_calibration(options)), _model(options)
    machine = Machine.detect(device="cpu", threads=options.threads)
    logs: list[Any] = []

    def work() -> None:
        checkpoint = Checkpoint.open(model)
        arch = checkpoint.arch()
        context = CalibrationContext(tokens, machine, scratch)
        decision = method.decide(ModelView(arch, checkpoint, {}, context))
        logs.append(decision.log)
        rewrite(checkpoint, arch, decision.edits, options.work / "out", ram_bytes=1 << 30)

    # The gradients of a draw are the same for all patterns: they are taken once.
    scratch = options.work / ("scratch" if not options.draw else f"scratch-{options.draw}")
    if not options.draw:
        shutil.rmtree(scratch, ignore_errors=True)
    taken = measured(work)
    for folder in (scratch,) if not options.draw else scratch.glob("sweep-*"):
        shutil.rmtree(folder, ignore_errors=True)
    return taken | {"sparsity": logs[0]["sparsity"], "mask_digest": logs[0]["mask_digest"]}


def _peer(options: argparse.Namespace) -> dict[str, Any]:
    """llm-compressor on a model that is loaded, saved without its own compression."""
    import llmcompressor
    import torch
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[options.method]
    structure, sparsity = "0:0", 0.5
    if ":" in options.pattern:
        keep, of = map(int, options.pattern.split(":"))
        structure, sparsity = f"{of - keep}:{of}", 1 - keep / of  # theirs counts zeros
    recipe = kind(sparsity=sparsity, mask_structure=structure, ignore=["re:.*lm_head"])
    ids, model = _calibration(options), _model(options)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    models: list[Any] = []

    def load() -> None:
        models.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))

    def work() -> None:
        llmcompressor.oneshot(
            model=models[0],
            dataset=DataLoader(rows, batch_size=BATCH),  # type: ignore[arg-type]
            recipe=recipe,
            pipeline="sequential",
        )

    with Peak() as peak:
        load()
        taken = measured(work)
    weights = {
        name: value for name, value in models[0].state_dict().items() if "lm_head" not in name
    }
    out = options.work / "out"
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.model / file, out / file)
    matrices = [value for name, value in weights.items() if name.endswith("proj.weight")]
    zeros = sum(int((value == 0).sum()) for value in matrices)
    return taken | {
        "peak_over_imports_bytes": peak.bytes,
        "sparsity": zeros / sum(value.numel() for value in matrices),
        "version": llmcompressor.__version__,
    }


def _draw(options: argparse.Namespace) -> dict[str, Any]:
    """All cases of a draw of calibration windows, ours and as released."""
    import _sparse_released
    import torch

    torch.set_num_threads(options.threads)
    rows = []
    for case, order in itertools.product(options.drawn, options.orders):
        options.method, options.pattern = case.split()
        options.order = "block" if order == "released" else order
        if order == "released":
            ids = _calibration(options)
            taken = _sparse_released.job(options, _model(options), ids, measured)
        else:
            taken = _ours(options)
        row = {"who": "released" if order == "released" else "ours", "method": options.method}
        row |= {"pattern": options.pattern, "order": options.order, "draw": options.draw}
        rows.append(row | taken | _evaluate(options))
        shutil.rmtree(options.work / "out")
        print(*list(row.values())[:5], f"{rows[-1]['perplexity']:.2f}", file=sys.stderr, flush=True)
    return {"rows": rows}


def _evaluate(options: argparse.Namespace, at: Path | None = None) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(
        at or options.work / "out", dtype=torch.float32
    ).eval()
    losses = []
    with torch.inference_mode():
        for window in torch.load(options.work / "evaluation.pt"):
            logits = model(window[None], use_cache=False).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, window[1:])))
    mean = sum(losses) / len(losses)
    return {"perplexity": float(torch.tensor(mean, dtype=torch.float64).exp()), "losses": losses}


def _dense(options: argparse.Namespace) -> dict[str, Any]:
    return _evaluate(options, options.model)


JOBS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tokens": _tokens,
    "forward": _forward,
    "alternating": _alternating,
    "dense": _dense,
    "ours": _ours,
    "peer": _peer,
    "draw": _draw,
    "evaluate": _evaluate,
}
