"""Estimates healing's memory, FLOPs and disk, and chooses the micro-batch that fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import prod
from typing import Final

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import answer_bytes, answers_cost
from prune_export.contracts import Cost
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.sampling import READ_BYTES_A_SECOND, STEP_SECONDS
from prune_export.training.adapters.targets import linear_weights, targets
from prune_export.training.attention import makes_scores, score_bytes
from prune_export.training.full_weights import trained_tensors
from prune_export.training.settings import Quantization, Settings, Training
from prune_export.units import GIB, MIB, text_from_bytes

PROCESS_BYTES: Final = 620 * MIB
"""Python with torch, transformers, peft, accelerate and bitsandbytes imported, measured."""

_MAPPED_BYTES: Final = GIB
"""The most of the mapped weight files that is counted; the kernel takes these pages back."""

_FRAGMENTS: Final = 1.12
"""Memory that the allocator holds for a byte of activations, measured."""

_NF4_BYTES: Final = 0.53
"""A parameter in NF4 with its doubly quantized scales: 4 bits + 8 / 64 + 32 / (64 * 256) bits."""

_NF4_SINGLE_BYTES: Final = 0.5625
"""The same with float32 scales."""

_SUM_BYTES: Final = 12
"""A weight of the layer whose masked sum, or its gradient, is being formed."""

_STEP_TOKENS: Final = 1024
"""Tokens at once beyond which a CPU gets no faster."""

_ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Size:
    """The counts of parameters that memory and time follow from.

    `trained` are an adapter's, or with `whole` the model's own.
    """

    stored: int
    linear: int
    head: int
    trained: int
    adapted: int
    widest: int
    largest: int
    whole: bool = False

    @staticmethod
    def of(arch: Arch, settings: Training) -> Size:
        """Counts the parameters of a model and of its adapters."""
        chosen = _adapted(arch, settings)
        trained = 0
        if isinstance(settings, Settings):
            trained = sum(settings.rank * sum(arch.shape(tensor)) for tensor in chosen)
        else:
            own = trained_tensors(arch, getattr(settings, "train_embeddings", False))
            trained = sum(prod(arch.shape(tensor)) for tensor in own)
        return Size(
            stored=arch.parameters(),
            linear=sum(prod(arch.shape(tensor)) for tensor in linear_weights(arch)),
            head=arch.head_parameters(),
            trained=trained,
            adapted=sum(prod(arch.shape(tensor)) for tensor in chosen),
            widest=max((prod(arch.shape(tensor)) for tensor in chosen), default=0),
            largest=max(prod(arch.shape(tensor)) for tensor in arch.stored()),
            whole=not isinstance(settings, Settings),
        )


def _adapted(arch: Arch, settings: Training) -> tuple[Tensor, ...]:
    """The weights that get an adapter."""
    return targets(settings.targets, arch) if isinstance(settings, Settings) else ()


def base_bytes(size: Size, quantization: Quantization | None, item: int) -> int:
    """The weights of the model while it is trained; what is trained of them is counted apart."""
    if size.whole:
        # Held in float32, and, where it computes in less, copied for each pass.
        copied = size.linear + size.head if item < 4 else 0
        return 4 * (size.stored - size.trained) + item * copied
    if quantization is None:
        return size.stored * item
    each = _NF4_BYTES if quantization.double else _NF4_SINGLE_BYTES
    return int(size.linear * each) + (size.stored - size.linear) * item


def zeros_bytes(size: Size, settings: Training, quantization: Quantization | None) -> int:
    """What keeping zeros takes: the float32 sums of one layer at a time, and masks."""
    if settings.keep_zeros is False:
        return 0
    if size.whole:
        return size.linear
    packed = size.adapted // 8 if quantization else 0
    return _SUM_BYTES * size.widest + packed


def token_bytes(
    arch: Arch, settings: Training, quantization: Quantization | None, item: int
) -> tuple[int, int]:
    """Activation bytes that a trained token holds: in one block, and in the logits.

    A block keeps the inputs and outputs of its linear layers, and float32 copies in its norms. An
    adapter that computes in float32 keeps its input once more, twice with dropout, and a 4-bit
    layer's output; in less, only a copy with dropout.
    """
    chosen = {tensor.name for tensor in _adapted(arch, settings)}
    copies = 2 if isinstance(settings, Settings) and settings.dropout else 1
    heaviest = 0
    for layer in range(arch.layers):
        kept = 4 * 4 * arch.sizes["residual"]
        for tensor in linear_weights(arch):
            if tensor.layer == layer:
                shape = arch.shape(tensor)
                kept += item * sum(shape)
                if tensor.name in chosen and isinstance(settings, Settings):
                    # Input and output together are known, whichever is the first.
                    half = sum(shape) // 2
                    more = copies * half if item == 4 else (copies - 1) * half
                    kept += item * (more + settings.rank)
                    kept += item * half if quantization and item == 4 else 0
        heaviest = max(heaviest, kept)
    # The logits and their gradient, which takes the place of a teacher's.
    return heaviest, 2 * item * arch.sizes["vocab"]


def activation_bytes(
    arch: Arch,
    settings: Training,
    quantization: Quantization | None,
    *,
    item: int,
    tokens: int,
    checkpointing: bool,
    scored: int = 0,
) -> int:
    """The bytes of the activations of `tokens` trained at once.

    `scored` is the length of windows whose attention scores are held, 0 where none are.
    """
    block, logits = token_bytes(arch, settings, quantization, item)
    block += score_bytes(_heads(arch), scored)
    blocks = arch.layers * block
    if checkpointing:
        blocks = block + arch.layers * item * arch.sizes["residual"]
    return int(_FRAGMENTS * tokens * (blocks + logits))


def _heads(arch: Arch) -> int:
    """The heads of the block that has the most."""
    sizes = arch.sizes
    return max(
        sizes.get(f"kv.{layer}", 0) * sizes.get(f"group.{layer}", 1) for layer in range(arch.layers)
    )


@dataclass(frozen=True)
class Fit:
    """How many windows are trained at once, whether activations are recomputed, and if it fits."""

    micro_batch: int
    gradient_checkpointing: bool
    fits: bool = True


def fit(
    arch: Arch,
    settings: Training,
    quantization: Quantization | None,
    machine: Machine,
    *,
    length: int,
    item: int,
    beside: int = 0,
) -> Fit:
    """Chooses what fits the machine, where the settings leave it open.

    A window that does not fit whole is recomputed block by block. As many windows are taken at
    once as fit; on a CPU no more than make it faster. `beside` are the bytes of a teacher.
    """
    size = Size.of(arch, settings)
    room = machine.gpu_bytes if machine.device == "cuda" else machine.ram_bytes - PROCESS_BYTES
    room = int(0.85 * room) - base_bytes(size, quantization, item) - 16 * size.trained
    room -= zeros_bytes(size, settings, quantization) + beside
    asked = settings.gradient_checkpointing
    least = (settings.micro_batch or 1) * length

    def fits(tokens: int, checkpointing: bool) -> bool:
        scored = length if makes_scores(machine.device, item, length) and not checkpointing else 0
        held = activation_bytes(
            arch,
            settings,
            quantization,
            item=item,
            tokens=tokens,
            checkpointing=checkpointing,
            scored=scored,
        )
        return held <= room

    checkpointing = not fits(least, False) if asked == "auto" else asked
    if settings.micro_batch is not None:
        return Fit(settings.micro_batch, checkpointing, fits(least, checkpointing))
    enough = settings.batch * length if machine.device == "cuda" else max(length, _STEP_TOKENS)
    fitting = [
        count
        for count in range(1, settings.batch + 1)
        if settings.batch % count == 0
        and count * length <= enough
        and fits(count * length, checkpointing)
    ]
    return Fit(max(fitting, default=1), checkpointing, fits(least, checkpointing))


def cost(
    arch: Arch,
    settings: Training,
    quantization: Quantization | None,
    machine: Machine | None,
    *,
    length: int,
    beside: int = 0,
) -> Cost:
    """Estimates the peak of memory, and the sums of FLOPs and disk.

    Without a machine both a CPU's memory and a GPU's are given as if each did the work alone.
    `beside` are the bytes of a teacher.
    """
    from prune_export.training.model import compute_dtype

    size = Size.of(arch, settings)
    planned = machine or Machine("cpu", 1 << 62, 0, 1)
    item = compute_dtype(settings.compute_dtype, planned).itemsize
    found = fit(arch, settings, quantization, planned, length=length, item=item, beside=beside)
    scored = length if makes_scores(planned.device, item, length) else 0
    stored_item = _ITEM_BYTES.get(str(arch.config.get("dtype")), 4)
    stored = size.stored * stored_item
    working = (
        beside
        + base_bytes(size, quantization, item)
        + 16 * size.trained
        + zeros_bytes(size, settings, quantization)
        + activation_bytes(
            arch,
            settings,
            quantization,
            item=item,
            tokens=found.micro_batch * length,
            checkpointing=found.gradient_checkpointing,
            scored=0 if found.gradient_checkpointing else scored,
        )
    )
    # What was written is loaded plain, and measured a window at a time.
    measured = length * arch.sizes["vocab"] * 2 * stored_item
    on_gpu = planned.device == "cuda"
    # A GPU that it does not fit has a part of it (`model.plain`).
    measured += min(stored, int(0.8 * planned.gpu_bytes)) if on_gpu else stored
    # Weights that are computed with as they are stored are the mapped file itself.
    as_stored = quantization is None and item == stored_item and not size.whole
    mapped = 0 if as_stored else min(stored, _MAPPED_BYTES)
    host = mapped + 12 * size.largest if on_gpu else max(mapped + working, measured)
    trained = settings.steps * settings.batch * length
    flops = trained * _token_flops(arch, settings, size, length, found.gradient_checkpointing)
    return Cost(
        ram_bytes=PROCESS_BYTES + host,
        gpu_bytes=max(working, measured) if on_gpu or machine is None else 0,
        disk_bytes=stored + 2 * 12 * size.trained,
        flops=flops,
        moved_bytes=3 * stored,
        seconds=15,
        bfloat16_flops=flops if item == 2 else 0.0,
    )


def _token_flops(
    arch: Arch, settings: Training, size: Size, length: int, recomputed: bool
) -> float:
    """FLOPs a trained token: forward, and backward without gradients of the frozen weights."""
    frozen = size.linear + size.head
    attention = 2.0 * arch.layers * length * arch.sizes["residual"]
    forwards = 2 if recomputed else 1
    # With zeros to keep, the gradient of each adapted matrix itself is formed. Whether `auto` finds
    # any is not known without the weights.
    masked = 2.0 * size.adapted if settings.keep_zeros is True else 0.0
    low_rank = masked or 6.0 * size.trained
    if size.whole:
        low_rank = 2.0 * size.trained  # its gradients; the weights' own products are all frozen's
    return (1 + forwards) * 2.0 * frozen + (2.5 + forwards) * attention + low_rank


_KEPT: Final = 128
"""Tokens a position that `cache: auto` keeps, if any; Minitron asks for more than 100."""


def answers_to_keep(
    arch: Arch,
    teacher: Arch,
    settings: Training,
    quantization: Quantization | None,
    machine: Machine,
    samples: int,
    length: int,
) -> int | None:
    """Of how many tokens a position a teacher's answers are kept; None: it runs beside the student.

    Left to us, it runs beside where that takes no more passes than keeping does, and where there
    is room for it without recomputing what the student would otherwise hold.
    """
    from prune_export.training.model import compute_dtype

    how = settings.distill
    assert how is not None
    if how.cache == "live" or how.needs_live:
        return None
    if how.cache != "auto":
        return min(int(how.cache), teacher.sizes["vocab"])
    item = compute_dtype(settings.compute_dtype, machine).itemsize
    alone, together = (
        fit(arch, settings, quantization, machine, length=length, item=item, beside=beside)
        for beside in (0, teacher.parameters() * item)
    )
    if together == alone and together.fits and settings.steps * settings.batch <= samples:
        return None
    return min(_KEPT, teacher.sizes["vocab"])


def taught_cost(
    arch: Arch,
    teacher: Arch,
    settings: Training,
    quantization: Quantization | None,
    machine: Machine,
    samples: int,
    length: int,
) -> tuple[Cost, str]:
    """What healing takes with a teacher, and what is done with it."""
    from prune_export.training.model import compute_dtype

    kept = answers_to_keep(arch, teacher, settings, quantization, machine, samples, length)
    item = compute_dtype(settings.compute_dtype, machine).itemsize
    beside = 0 if kept else teacher.parameters() * item
    how = settings.distill
    assert how is not None
    if how.hidden is not None:
        pairs = 1 if how.hidden.by == "last_2" else arch.layers
        beside += 4 * pairs * length * (arch.sizes["residual"] + teacher.sizes["residual"])
    if how.on_policy and how.new_tokens >= length:
        raise PlanError(
            "objective.distill.new_tokens",
            f"is {how.new_tokens}, and windows have {length} tokens, which begin with a prompt",
            "write fewer, or a larger `length`",
        )
    own = cost(arch, settings, quantization, machine, length=length, beside=beside)
    if kept is None:
        each = 2.0 * (teacher.block_parameters() + teacher.head_parameters())
        each += 2.0 * teacher.layers * length * teacher.sizes["residual"]
        trained = settings.steps * settings.batch * length
        note = f"teacher beside it ({text_from_bytes(beside)})"
        flops, seconds = own.flops + trained * each, own.seconds
        if how.on_policy:
            share = how.on_policy * settings.steps * settings.batch
            size = Size.of(arch, settings)
            flops += share * length * 2.0 * (size.linear + size.head)
            rows = settings.micro_batch or 1
            read = 0.0 if machine.device == "cuda" else size.stored * item / READ_BYTES_A_SECOND
            step = read + STEP_SECONDS * arch.layers
            seconds += share / rows * how.new_tokens * step
            note += f"; {how.on_policy:.0%} of steps on-policy, {how.new_tokens} tokens"
        note += f"; hidden states {how.hidden.by}" if how.hidden else ""
        narrow = flops if item == 2 else 0.0
        return dataclasses.replace(own, flops=flops, seconds=seconds, bfloat16_flops=narrow), note
    made = answers_cost(teacher, samples, length, kept, machine)
    each_bytes = answer_bytes(teacher.sizes["vocab"], kept)
    note = f"teacher's answers kept: {kept} tokens, {each_bytes} bytes a position"
    return Cost(
        ram_bytes=max(own.ram_bytes, PROCESS_BYTES + made.ram_bytes),
        gpu_bytes=max(own.gpu_bytes, made.gpu_bytes),
        disk_bytes=own.disk_bytes + made.disk_bytes,
        flops=own.flops + made.flops,
        moved_bytes=own.moved_bytes + made.moved_bytes,
        seconds=own.seconds + made.seconds,
        bfloat16_flops=own.bfloat16_flops,
    ), note
