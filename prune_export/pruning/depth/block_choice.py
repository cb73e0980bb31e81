"""What all depth methods share: the recipe keys for how many blocks, the choice, and the log."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from prune_export.ablated import Ablated
from prune_export.arch import Arch
from prune_export.calibrate import ModelView, Seam, Unit
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.numeric.scores import least, run_sums
from prune_export.pruning.depth import seam_refit
from prune_export.surgery import Drop

Sparsity = Annotated[
    float | None,
    Field(gt=0, lt=1, description="Fraction of the blocks to remove, rounded; at least one block."),
]
Remove = Annotated[int | None, Field(ge=1, description="Number of blocks to remove.")]
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | None,
    Field(min_length=1, description="The blocks to remove, counted from 0; needs no data."),
]
Contiguous = Annotated[bool, Field(description="Remove one run of neighbouring blocks.")]


@dataclass(frozen=True)
class Amount(seam_refit.Refits):
    """How many blocks to remove: a fraction, a number or a list, exactly one of them.

    Every depth method is one, so these are keys of them all.

    Raises:
        PlanError: none or more than one is given, or a block is listed twice.
    """

    sparsity: Sparsity = None
    remove: Remove = None
    layers: Layers = None
    refit: seam_refit.Refit = "auto"

    def __post_init__(self) -> None:
        given = [key for key in ("sparsity", "remove", "layers") if getattr(self, key) is not None]
        if len(given) != 1:
            raise PlanError(
                "how many blocks",
                f"got {' and '.join(f'`{key}`' for key in given) or 'nothing'}, "
                "expected exactly one of `sparsity`, `remove`, `layers`",
                "write for example `sparsity: 0.2`",
            )
        listed = self.layers or ()
        twice = sorted({layer for layer in listed if listed.count(layer) > 1})
        if twice:
            raise PlanError("layers", f"lists {twice} twice", "name each block once")

    def of(self, arch: Arch) -> int:
        """The number of blocks to remove from a model.

        Raises:
            PlanError: it would leave no block.
        """
        if self.layers is not None:
            return len(self.layers)
        if self.remove is not None:
            count = self.remove
        else:
            # Rounded first, as 0.35 * 30 is 10.499999999999998.
            count = max(1, int(round((self.sparsity or 0.0) * arch.layers, 9) + 0.5))
        if count >= arch.layers:
            raise PlanError(
                "how many blocks",
                f"{count} of {arch.layers} blocks would be removed, expected to keep at least one",
                f"write `remove: {arch.layers - 1}` or less" if arch.layers > 1 else "",
            )
        return count

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut.

        Where blocks differ in shape, as if the blocks before the last were removed: which ones it
        will be is not known without data.
        """
        return arch.without(self.layers or deepest(arch.layers, self.of(arch)))

    def ablated(self, arch: Arch, known: Ablated) -> Ablated:
        """The parts of the remaining blocks that are zeroed."""
        if self.layers is not None:
            return known.without(arch.kept(self.layers))
        remove = self.of(arch)
        return known.without_some(remove, arch.layers - remove)

    def seams_known(self, arch: Arch) -> tuple[Seam, ...] | None:
        """The seams, where the recipe lists the blocks; None where it does not."""
        return None if self.layers is None else seam_refit.seams_listed(arch, self.layers, "block")

    def seams_at_most(self, arch: Arch) -> str:
        """An upper bound on the number of seams, in words."""
        return seam_refit.at_most(self.of(arch))

    def dropping(self, model: ModelView, dropped: Collection[int], **log: Any) -> Decision:
        """Decides to drop these blocks, and refits the projections before them."""
        blocks = [Unit(layer) for layer in dropped]
        return self.refitted(model, decision(model.arch, dropped, **log), blocks)


def deepest(layers: int, remove: int) -> range:
    """Chooses the `remove` deepest blocks except the last one."""
    return range(layers - remove - 1, layers - 1)


def decision(arch: Arch, dropped: Collection[int], **log: Any) -> Decision:
    """Makes the edits that drop these blocks; the log names them and those that are kept."""
    chosen = tuple(sorted(dropped))
    kept = arch.kept(chosen)
    return Decision((Drop(chosen),), {"dropped": list(chosen), "kept": list(kept), **log})


@dataclass(frozen=True)
class Choice:
    """The blocks chosen for removal; `log` has the runner-up and its margin."""

    dropped: tuple[int, ...]
    log: dict[str, Any]


def least_run(run_scores: Sequence[float], remove: int, of: Sequence[int] = ()) -> Choice:
    """Chooses the run of adjacent blocks with the least score.

    `run_scores[i]` is of the run from `of[i]` on; `of` are the blocks to choose from, or all.
    """
    of = of or range(len(run_scores) + remove - 1)
    order = least(run_scores)
    start = order[0]
    log: dict[str, Any] = {
        "run_scores": [[block, score] for block, score in zip(of, run_scores, strict=False)],
        "score": run_scores[start],
    }
    if len(order) > 1:
        log["runner_up"] = list(of[order[1] : order[1] + remove])
        log["margin"] = run_scores[order[1]] - run_scores[start]
    return Choice(tuple(of[start : start + remove]), log)


def least_blocks(
    block_scores: Sequence[float], remove: int, *, contiguous: bool, of: Sequence[int]
) -> Choice:
    """Chooses the blocks with the least scores, or the run with the least sum.

    `block_scores[i]` is of the block `of[i]`.
    """
    if contiguous:
        return least_run(run_sums(block_scores, remove), remove, of)
    ranked = least(block_scores)
    order = [of[i] for i in ranked]
    log: dict[str, Any] = {"order": order}
    if remove < len(order):
        log["runner_up"] = [order[remove]]
        log["margin"] = block_scores[ranked[remove]] - block_scores[ranked[remove - 1]]
    return Choice(tuple(order[:remove]), log)
