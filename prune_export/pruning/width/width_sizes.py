"""Computes each axis' size after a width cut, and checks that a stock config can express it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal

from prune_export.arch import Arch
from prune_export.errors import PlanError

Part = Literal["ffn", "heads", "kv_groups", "hidden", "experts"]
PARTS: Final[tuple[Part, ...]] = ("ffn", "heads", "kv_groups", "hidden", "experts")

AXES: Final[Mapping[Part, tuple[str, ...]]] = {
    "ffn": ("mlp", "moe", "shared"),
    "heads": ("group",),
    "kv_groups": ("kv",),
    "hidden": ("residual",),
    "experts": ("expert",),
}
"""The table's axes of each part; query heads that share no keys are cut along `kv`."""

_MULTIPLE: Final = 64
"""Widths that every runtime's kernels like."""

_STEPS: Final = 8
"""Where a width has fewer than eight steps of 64, smaller ones are taken."""

_NEAR: Final = 16
"""How far a hidden size may be from the one asked for, as a fraction of the whole, before a smaller
multiple is tried."""

_ROUNDED: Final = frozenset({"ffn", "hidden"})


def sizes_after(
    arch: Arch, fractions: Mapping[Part, float], multiple_of: int | None
) -> dict[str, int]:
    """Computes the new size of each axis that is cut.

    Raises:
        PlanError: the model has no such part, or it is too narrow to be cut.
    """
    if "heads" in fractions and "kv_groups" in fractions and not shares_keys(arch):
        raise PlanError(
            "heads, kv_groups",
            "are the same in this model: each query head has keys and values of its own",
            "write only `heads`",
        )
    found: dict[str, int] = {}
    for part, fraction in fractions.items():
        if part == "hidden" and multiple_of is None:
            continue
        for axis in axes_of(arch, part):
            step = 1
            if part in _ROUNDED:
                step = multiple_of or usual_multiple(arch.sizes[axis])
            found[axis] = _left(part, arch.sizes[axis], fraction, step)
    if "hidden" in fractions and multiple_of is None:
        found["residual"] = _hidden(arch, found, fractions["hidden"])
    return found


def _hidden(arch: Arch, others: Mapping[str, int], fraction: float) -> int:
    """Chooses a hidden size near the one asked for, of the largest multiple that a config allows.

    Some insist that it is a multiple of the number of heads, which may leave no multiple of 64.
    """
    size = arch.sizes["residual"]
    wanted, step = size * (1 - fraction), usual_multiple(size)
    while step:
        near = sorted(range(step, size, step), key=lambda other: abs(other - wanted))
        for other in near:
            if abs(other - wanted) > size / _NEAR:
                break
            if _fits(arch, {**others, "residual": other}):
                return other
        step //= 2
    return _left("hidden", size, fraction, usual_multiple(size))


def axes_of(arch: Arch, part: Part) -> list[str]:
    """The axes along which a part (`ffn`, `heads` …) is cut.

    Raises:
        PlanError: the model has no such part.
    """
    names = AXES[part]
    if part == "heads" and not shares_keys(arch):
        names = ("kv",)
    axes = [axis for axis in arch.sizes if axis.split(".")[0] in names]
    if not axes:
        raise PlanError(part, f"is nothing that a {arch.family} model has", "remove the key")
    return axes


def shares_keys(arch: Arch) -> bool:
    """Whether several query heads share each key-value head."""
    return any(size > 1 for axis, size in arch.sizes.items() if axis.split(".")[0] == "group")


def usual_multiple(size: int) -> int:
    """The step of sizes: 64, or the largest power of two that leaves eight steps or more."""
    step = _MULTIPLE
    while step > 1 and (size % step or size < _STEPS * step):
        step //= 2
    return step


def _left(part: str, size: int, fraction: float, step: int) -> int:
    steps = size // step
    if steps < 2 and not (steps == 1 and size > step):
        raise PlanError(
            part,
            f"is {size}, which cannot be made smaller in steps of {step}",
            "write a smaller `multiple_of`" if step > 1 else "cut another part",
        )
    # Rounded first, as 0.35 * 30 is 10.499999999999998; something goes, something stays.
    wanted = int(round(size * (1 - fraction) / step, 9) + 0.5)
    most = steps if size > steps * step else steps - 1
    return step * min(max(wanted, 1), most)


def check_sayable(arch: Arch, sizes: Mapping[str, int], multiple_of: int | None) -> Arch:
    """Checks that a stock config can express a uniform cut; gives the shapes after it.

    Raises:
        PlanError: cutting heads would change the others, or no stock config can say the sizes; the
            nearest sizes that one can say are named.
    """
    check_heads(arch, sizes)
    after = arch.with_sizes(sizes)
    try:
        after.to_config(arch.config)
    except PlanError as error:
        offers = list(_offers(arch, sizes, multiple_of))
        heads = any(axis.split(".")[0] in ("kv", "group") for axis in sizes)
        fix = _advice(error.fix, offers, heads=heads)
        raise PlanError(error.where, error.problem, fix) from None
    return after


def check_heads(arch: Arch, sizes: Mapping[str, int]) -> None:
    """Refuses to cut heads that are normalized together (olmo2).

    Raises:
        PlanError: they are.
    """
    heads = [axis for axis in sizes if axis.split(".")[0] in ("kv", "group")]
    for axis in heads:
        for tensor in arch.using(axis):
            if tensor.role.startswith("norm."):
                raise PlanError(
                    tensor.name,
                    "normalizes all heads together, so that without some the others would change",
                    "cut `ffn` or `hidden` instead of heads",
                )


def _offers(
    arch: Arch, sizes: Mapping[str, int], multiple_of: int | None
) -> Iterator[tuple[str, int, int]]:
    """Lists sizes that would do, of one part at a time, nearest first: (part, before, after)."""
    for part, names in (("heads", "group"), ("kv_groups or heads", "kv"), ("hidden", "residual")):
        axes = [axis for axis in sizes if axis.split(".")[0] == names]
        if not axes:
            continue
        size, wanted = arch.sizes[axes[0]], sizes[axes[0]]
        step = (multiple_of or usual_multiple(size)) if names == "residual" else 1
        others = sorted(range(step, size, step), key=lambda other: abs(other - wanted))
        fits = [other for other in others if _fits(arch, {**sizes, **dict.fromkeys(axes, other)})]
        for other in fits[:2]:
            yield part, size, other


def _fits(arch: Arch, sizes: Mapping[str, int]) -> bool:
    try:
        arch.with_sizes(sizes).to_config(arch.config)
    except PlanError:
        return False
    return True


def _advice(fix: str, offers: list[tuple[str, int, int]], *, heads: bool) -> str:
    if not offers:
        return (
            fix
            if not heads
            else f"{fix}; or write `per_layer: true`: what is removed is then stored as zeros"
        )
    listed = " or ".join(
        f"`{part.split()[0]}: {1 - left / size:.3g}` ({left} of {size} left)"
        for part, size, left in offers
    )
    return f"{fix}: write {listed}"
