"""Heals a checkpoint from end to end: load, measure, train, merge, and measure the result."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import TokenSet, refuse_unknown
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HEALING_WINDOWS, HealRecord, Work
from prune_export.errors import StageError
from prune_export.surgery import Edit, rewrite
from prune_export.training.adapters.merge import merged
from prune_export.training.adapters.targets import linear_weights, targets
from prune_export.training.full_weights import Whole, trained_tensors
from prune_export.training.layerdrop import left_out
from prune_export.training.loop import (
    Run,
    held_out_loss,
    own_randomness,
    refuse_diverged,
    train,
    trained_tokens,
)
from prune_export.training.memory import answers_to_keep, fit
from prune_export.training.model import compute_dtype, plain, quiet
from prune_export.training.settings import Quantization, Settings, Training
from prune_export.training.shared import Lesson, share_lesson, student_of
from prune_export.training.state import State, write_whole
from prune_export.training.teacher import comparing, lessons
from prune_export.training.zeros import kept_zeros, refuse_filled

_RUN: Final = "run.json"
_MOST_HELD_OUT: Final = 8

_MEASURED_SHARE: Final = 0.8
"""Of the memory that a teacher may take to be measured; a larger one would be read each time."""

_EXACT_NATS: Final = {torch.float32: 0.002, torch.bfloat16: 0.03}
"""How far the loss of what was written may be from that of what was trained, by compute dtype."""

_OTHER_BASE_NATS: Final = 0.1
_OTHER_BASE_SHARE: Final = 0.5
"""How much worse the result may be when it was merged into weights it was not trained on: so many
nats, or this share of what training gained, whichever is more."""


def heal(
    settings: Training,
    quantization: Quantization | None,
    checkpoint: Path,
    tokens: TokenSet,
    out: Path,
    work: Work,
) -> HealRecord:
    """Trains adapters on `checkpoint`, or its own weights, and writes what comes of it to `out`.

    Raises:
        StageError: there are too few windows, training diverged, or the result is not what was
            trained.
    """
    source = Checkpoint.open(checkpoint)
    # The plan has answered for keys that the table does not know.
    arch = source.arch(ignore_keys=source.full_config())
    refuse_unknown(arch, tokens)
    names = [tensor.name for tensor in _trained(settings, arch)]
    rebased = quantization is not None and quantization.into == "quantized_base"
    linear = [tensor.name for tensor in linear_weights(arch)]
    written = linear if rebased or not isinstance(settings, Settings) else names
    zeros = kept_zeros(source, written, settings.keep_zeros)
    run, key = _decided(settings, quantization, source, arch, tokens, work)
    windows = tokens.ids[: len(tokens.ids) - run.held_out]
    held_out = tokens.ids[len(windows) :]
    counted, kept_back = None, None
    if tokens.counted is not None:
        counted, kept_back = tokens.counted[: len(windows)], tokens.counted[len(windows) :]

    with own_randomness(run.threads), quiet():
        answers, teacher = lessons(settings.distill, run.kept, work)
        lesson = Lesson(
            settings,
            quantization,
            checkpoint,
            names,
            zeros,
            run,
            windows,
            counted,
            answers,
            teacher,
            work.teacher.blocks if work.teacher else None,
        )
        share_lesson(work, lesson)
        goal = lesson.goal
        student = student_of(settings, quantization, source, names, run, zeros)
        state = State.load(work.scratch, key)
        if "before" not in state.held_out:
            before = held_out_loss(student.model, held_out, 1, run.device, kept_back)
            state = dataclasses.replace(state, held_out={"before": before})
        with (
            left_out(
                student.model,
                student.blocks(arch),
                settings.layerdrop,
                in_tuple=arch.table.tuple_blocks,
            ),
            comparing(goal, student.blocks(arch), arch, settings, lesson.dense, run.device) as goal,
        ):
            state = train(
                student,
                windows,
                settings,
                run,
                state,
                work=work,
                key=key,
                counted=counted,
                objective=goal,
            )
        del goal, lesson
        losses = dict(state.held_out)
        losses["trained"] = held_out_loss(student.model, held_out, 1, run.device, kept_back)
        refuse_diverged(losses["trained"], settings.steps, settings)  # by the last step of all
        began = time.monotonic()
        edits: Iterable[Edit]
        if isinstance(student, Whole):
            edits = student.edits(source, zeros)
        else:
            assert isinstance(settings, Settings)
            edits = merged(
                source,
                student.factors(),
                scaling=settings.scaling,
                transposed=student.transposed,
                base=student.dequantized() if rebased else {},
                keep_zeros=zeros,
            )
        written_to = _written(source, arch, edits, out, work)
        patterns = refuse_filled(source, written_to, arch, zeros)
        del student, edits
        gc.collect()
        result = plain(out, source.nbytes, work.machine, work.scratch)
        losses["merged"] = held_out_loss(result, held_out, 1, run.device, kept_back)
        del result
        if work.teacher is not None and (floor := _teachers(work, held_out, kept_back, run)):
            losses["teacher"] = floor
    _refuse_mismatch(losses, run, quantization, source)
    return HealRecord(
        steps=settings.steps,
        trained_tokens=state.tokens
        if settings.distill and settings.distill.on_policy
        else trained_tokens(windows, counted, settings),
        seconds=state.seconds + time.monotonic() - began,
        log={
            "loss": [list(row) for row in state.losses],
            "held_out": {"windows": run.held_out, "loss": losses},
            "training": _arguments(settings, quantization, run, names, source, arch),
            "kept_zeros": {
                "weights": len(zeros),
                "zeros": sum(zeros.values()),
                "patterns": patterns,
            },
        },
    )


def _trained(settings: Training, arch: Arch) -> tuple[Tensor, ...]:
    """The stored weights that get an adapter, or are trained themselves."""
    if isinstance(settings, Settings):
        return targets(settings.targets, arch)
    return trained_tensors(arch, getattr(settings, "train_embeddings", False))


def _decided(
    settings: Training,
    quantization: Quantization | None,
    source: Checkpoint,
    arch: Arch,
    tokens: TokenSet,
    work: Work,
) -> tuple[Run, str]:
    """Decides what the settings leave open, as an earlier run of the same key did."""
    samples, machine = len(tokens.ids), work.machine.share(work.team.here)
    if samples < HEALING_WINDOWS:
        raise StageError(
            "healing data",
            f"got {samples} window{'s' * (samples != 1)} of {tokens.length} tokens, expected at "
            f"least {HEALING_WINDOWS}: one to train on, one to measure with",
            "give more text, or a shorter `length`",
        )
    dtype = compute_dtype(settings.compute_dtype, work.machine)
    about = {
        "settings": settings.described(),
        "quantization": dataclasses.asdict(quantization) if quantization else None,
        "tokens": tokens.fingerprint,
        "model": {name: [e.dtype, list(e.shape)] for name, e in source.entries.items()},
        "device": work.machine.device,
    }
    if settings.distill is not None and work.teacher is not None:
        about["teacher"] = work.teacher.id
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    work.scratch.mkdir(parents=True, exist_ok=True)
    file = work.scratch / _RUN
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known.pop("key") == key:
            return Run(**known), key
    beside, kept = 0, None
    if settings.distill is not None and work.teacher is not None:
        opened = Checkpoint.open(work.teacher.path)
        teacher = opened.arch(ignore_keys=opened.full_config())
        kept = answers_to_keep(
            arch, teacher, settings, quantization, machine, samples, tokens.length
        )
        beside = 0 if kept else teacher.parameters() * dtype.itemsize
    fitted = fit(
        arch,
        settings,
        quantization,
        machine,
        length=tokens.length,
        item=dtype.itemsize,
        beside=beside,
    )
    run = Run(
        device=machine.device,
        threads=machine.threads,
        compute_dtype=str(dtype).removeprefix("torch."),
        micro_batch=fitted.micro_batch,
        gradient_checkpointing=fitted.gradient_checkpointing,
        held_out=max(1, min(_MOST_HELD_OUT, samples // 10)),
        kept=kept,
    )
    write_whole(file, json.dumps({**dataclasses.asdict(run), "key": key}).encode())
    return run, key


def _written(
    source: Checkpoint, arch: Arch, edits: Iterable[Edit], out: Path, work: Work
) -> Checkpoint:
    by_file: Counter[Path] = Counter()
    for entry in source.entries.values():
        by_file[entry.file] += entry.nbytes
    return rewrite(
        source,
        arch,
        edits,
        out,
        ram_bytes=work.machine.ram_bytes,
        # The same limit gives the same shards: every tensor that ended one would end it again.
        max_shard_bytes=max(by_file.values()),
        progress=work.progress,
    )


def _teachers(
    work: Work, held_out: torch.Tensor, counted: torch.Tensor | None, run: Run
) -> float | None:
    """The teacher's own held-out loss, below which its student hardly comes; None if too large."""
    assert work.teacher is not None
    opened, machine = Checkpoint.open(work.teacher.path), work.machine
    room = machine.gpu_bytes if machine.device == "cuda" else machine.ram_bytes
    if opened.nbytes > _MEASURED_SHARE * room:
        return None
    model = plain(opened.path, opened.nbytes, machine, work.scratch)
    return held_out_loss(model, held_out, 1, run.device, counted)


def _refuse_mismatch(
    losses: Mapping[str, float],
    run: Run,
    quantization: Quantization | None,
    source: Checkpoint,
) -> None:
    """Compares what was written with what was trained.

    Weights that were not trained on may well be better, and then the result is too.
    """
    gap = losses["merged"] - losses["trained"]
    if quantization is not None and quantization.into == "original":
        gained = losses["before"] - losses["trained"]
        allowed = max(_OTHER_BASE_NATS, _OTHER_BASE_SHARE * gained)
        if gap <= allowed:
            return
        fix = "write `merge_into: quantized_base`"
    else:
        narrow = run.dtype != torch.float32 or source.dtype in ("bfloat16", "float16")
        allowed = _EXACT_NATS[torch.bfloat16 if narrow else torch.float32]
        if abs(gap) <= allowed:
            return
        fix = "report this with the recipe"
    raise StageError(
        "healing  merge",
        f"the checkpoint written has a loss of {losses['merged']:.4f} on held-out text, the model "
        f"that was trained {losses['trained']:.4f}; {allowed:.3g} is the most they may differ",
        fix,
    )


def _arguments(
    settings: Training,
    quantization: Quantization | None,
    run: Run,
    names: list[str],
    source: Checkpoint,
    arch: Arch,
) -> dict[str, Any]:
    """Lists every number that the training used, for the record."""
    trained: dict[str, Any] = {
        "targets": list(dict.fromkeys(arch.by_name[name].role for name in names))
    }
    if isinstance(settings, Settings):
        trained |= {
            "alpha": settings.scaling * settings.rank,
            "adapted_weights": len(names),
            "adapter_parameters": sum(
                settings.rank * sum(arch.shape(arch.by_name[name])) for name in names
            ),
        }
    else:
        trained["trained_parameters"] = sum(prod(source.entries[name].shape) for name in names)
    return {
        **settings.described(),
        **trained,
        "warmup": settings.warmup_steps,
        "optimizer": "AdamW, betas 0.9 and 0.999, float32",
        "quantization": dataclasses.asdict(quantization) if quantization else None,
        **dataclasses.asdict(run),
    }
