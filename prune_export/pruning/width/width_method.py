"""What all width methods share: the recipe keys for sizes, and how scores become edits.

A method holds a scorer: of weights or gradients before anything is cut, of states as they pass, or
of both (`scorer`). The rest is here. Where only channels and heads go, in equal
numbers in every block, scoring and refitting are one pass: each projection is scored when its
inputs have arrived, cut and refitted, and the blocks after it see what it then gives. What can be
ranked only when all of the model has been seen (the hidden size, whole experts, widths that differ
by block) is scored in a pass before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import (
    DENSE_STATES,
    ExtraPass,
    ModelView,
    NormEnergy,
    SequentialResult,
    Statistic,
    added_times,
)
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.pruning.width import unit_edits, width_passes
from prune_export.pruning.width.scorer import ModelScorer, Scorer, Scores, StateScorer
from prune_export.pruning.width.unit_choice import chosen_everywhere, chosen_in_block, units_cut
from prune_export.pruning.width.width_sizes import (
    PARTS,
    Part,
    check_heads,
    check_sayable,
    sizes_after,
)

_Fraction = Annotated[float | None, Field(gt=0, lt=1)]


@runtime_checkable
class ProtectsBlocks(Protocol):
    """A width method that leaves some blocks whole where it ranks all of them together."""

    def protected(self, arch: Arch) -> frozenset[int]:
        """The blocks that `per_layer` leaves as they are."""


@runtime_checkable
class MovesUnits(Protocol):
    """A width method that changes what is kept, before the rest is cut."""

    def reworked(
        self, model: ModelView, kept: Scores, scores: Scores
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """The new values of tensors, by name; `kept` bool by axis, True where a unit stays."""


@dataclass(frozen=True)
class WidthMethod:
    """How much of the channels, heads, hidden size and experts is cut; keys of all width methods.

    A method defines `scorer`; the units with the least scores go.

    Raises:
        PlanError: nothing is to be cut, or something is said twice.
    """

    VERSION: ClassVar[str]

    sparsity: Annotated[
        float | None, Field(gt=0, lt=1, description="Fraction to remove of each of `axes`.")
    ] = None
    axes: Annotated[
        tuple[Part, ...], Field(min_length=1, description="What `sparsity` is removed of.")
    ] = ("ffn",)
    ffn: Annotated[_Fraction, Field(description="Fraction of the MLP channels to remove.")] = None
    heads: Annotated[
        _Fraction,
        Field(description="Fraction of the query heads to remove, the same in each group."),
    ] = None
    kv_groups: Annotated[
        _Fraction,
        Field(description="Fraction of the key-value heads to remove, with their queries."),
    ] = None
    hidden: Annotated[_Fraction, Field(description="Fraction of the hidden size to remove.")] = None
    experts: Annotated[_Fraction, Field(description="Fraction of whole experts to remove.")] = None
    multiple_of: Annotated[
        int | None,
        Field(ge=1, description="What widths are rounded to; 64 unless the model is too small."),
    ] = None
    per_layer: Annotated[
        bool,
        Field(description="Rank all blocks together; what goes is stored as zeros, and trimmed "
                          "from engines."),
    ] = False  # fmt: skip
    compensate: Annotated[
        Literal["auto"] | bool,
        Field(description="Refit the projections after the cut by least squares; `auto` keeps a "
                          "refit only where it is better on held-out tokens."),
    ] = "auto"  # fmt: skip
    towards: Annotated[
        Literal["auto", "dense", "own"],
        Field(description="What a refitted projection is to give: what brings the residual states "
                          "back to those of the `dense` model, or what it gave of all of its `own` "
                          "inputs; `auto` is `dense` where outputs are simply added to the states "
                          "(not in Gemma 2 and 3, OLMo 2, SliceGPT's). Experts: always `own`."),
    ] = "auto"  # fmt: skip
    rescale_norms: Annotated[
        bool,
        Field(description="After a cut of the hidden size, scale each norm's gain so that what "
                          "stays comes out as large as before."),
    ] = True  # fmt: skip

    def __post_init__(self) -> None:
        own = [part for part in PARTS if getattr(self, part) is not None]
        twice = [part for part in own if self.sparsity is not None and part in self.axes]
        if twice or (self.sparsity is None and not own):
            raise PlanError(
                "how much to cut",
                f"got `sparsity` of `{twice[0]}` and `{twice[0]}`"
                if twice
                else "got nothing, expected `sparsity` or a fraction of a part",
                "write for example `sparsity: 0.25` or `ffn: 0.25`",
            )
        if self.towards == "dense" and not self.refits():
            raise PlanError(
                "towards",
                "got `dense`, which says what projections are refitted to, but none is refitted",
                "leave out `towards`, or cut `ffn`, `heads` or `kv_groups` with `compensate: auto`",
            )
        wide = [part for part in self.fractions if part in ("hidden", "experts")]
        if self.per_layer and wide:
            raise PlanError(
                "per_layer",
                f"got true with `{wide[0]}`, which all blocks share",
                f"leave out `per_layer` or `{wide[0]}`",
            )

    @property
    def scorer(self) -> Scorer:
        """What scores the units: a `StateScorer`, a `ModelScorer`, or one object that is both.

        Raises:
            PlanError: the method defines none.
        """
        raise _without_scorer(self, "defines no `scorer`")

    @property
    def fractions(self) -> dict[Part, float]:
        """The fraction to remove of each part that is cut."""
        found: dict[Part, float] = {}
        for part in PARTS:
            own: float | None = getattr(self, part)
            if own is not None:
                found[part] = own
            elif self.sparsity is not None and part in self.axes:
                found[part] = self.sparsity
        return found

    def sizes(self, arch: Arch) -> dict[str, int]:
        """The size that each axis is left with (on average, with `per_layer`).

        Raises:
            PlanError: the model has no such part, or it is too narrow to be cut.
        """
        return sizes_after(arch, self.fractions, self.multiple_of)

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut; with `per_layer` they stay, as what goes is zeroed."""
        sizes = self.sizes(arch)
        if self.towards == "dense" and added_times(arch) is None:
            raise PlanError(
                "towards",
                f"got `dense`, but a {arch.family} model normalizes or turns what is added to its "
                "residual states",
                "write `towards: own`, or leave it out",
            )
        if self.per_layer:
            check_heads(arch, sizes)
            return arch
        return check_sayable(arch, sizes, self.multiple_of)

    def statistics(self, arch: Arch) -> tuple[Statistic | ExtraPass, ...]:
        """The statistics that `decide` reads, and the passes that it runs, in order."""
        passes: list[Statistic | ExtraPass] = [NormEnergy()] if self._rescales() else []
        scorer = self.scorer
        if isinstance(scorer, ModelScorer):
            passes += scorer.passes(arch)
        if self._measures():
            passes.append(ExtraPass(forwards=1.1, suspends=True))
        if self.refits():
            dense = self.aims(arch)
            passes.append(
                ExtraPass(
                    forwards=3.0 if dense else 1.6,
                    suspends=True,
                    ram_bytes=width_passes.refit_bytes(arch, self.sizes(arch), dense=dense),
                    states=1 + DENSE_STATES if dense else 1,
                )
            )
        return tuple(passes)

    def decide(self, model: ModelView) -> Decision:
        """Scores the units, chooses which to keep, and refits the projections."""
        arch, sizes = model.arch, self.sizes(model.arch)
        known = dict(self.scores_before(model))
        from_states = self._state_scorer()
        measures = from_states is not None and self._measures()
        if from_states is not None and measures:
            parts = frozenset(self.fractions)
            measured = model.sequential(
                width_passes.Measure(from_states, parts, arch, self._digest())
            )
            known = width_passes.added(arch, known, measured)
        kept: dict[str, torch.Tensor] = {}
        if known and (measures or from_states is None):
            if self.per_layer:
                own = self.protected(arch) if isinstance(self, ProtectsBlocks) else frozenset[int]()
                kept = chosen_everywhere(arch, known, sizes, own, self.multiple_of)
            else:
                kept = chosen_in_block(arch, known, sizes)
        result: SequentialResult | None = None
        if self.refits():
            cut = width_passes.Cut(
                from_states,
                arch,
                sizes,
                known,
                kept,
                model.calibration().tokens.ids.shape,
                always=self.compensate is True,
                method=self._digest(),
            )
            result = model.sequential(cut, dense=self.aims(arch))
            kept |= width_passes.kept_in(arch, result)
        shares = model.stat(NormEnergy()) if self._rescales() else None
        moved = self.reworked(model, kept, known) if isinstance(self, MovesUnits) else {}
        edits = unit_edits.edits(model, kept, result, moved, shares, wide=self.per_layer)
        return Decision(edits, unit_edits.log(arch, kept, known, result))

    def scores_before(self, model: ModelView) -> Scores:
        """The scores that are known before any unit is cut: of weights, or of gradients."""
        scorer = self.scorer
        if not isinstance(scorer, ModelScorer):
            return {}
        return scorer.scores(model, units_cut(model.arch, self.sizes(model.arch)))

    def refits(self) -> bool:
        """Whether projections are refitted: channels or heads go, and it is not switched off."""
        return self.compensate is not False and bool(
            self.fractions.keys() & {"ffn", "heads", "kv_groups"}
        )

    def aims(self, arch: Arch) -> bool:
        """Whether projections are refitted towards the dense model's residual states."""
        return self.towards != "own" and self.refits() and added_times(arch) is not None

    def _rescales(self) -> bool:
        """Whether norms are rescaled: the hidden size is cut, and it is not switched off."""
        return self.rescale_norms and "hidden" in self.fractions

    def _measures(self) -> bool:
        """Whether states must have been seen before anything is chosen."""
        whole = self.fractions.keys() & {"hidden", "experts"}
        from_states = self._state_scorer() is not None
        return from_states and (self.per_layer or bool(whole) or not self.refits())

    def _state_scorer(self) -> StateScorer | None:
        """What scores states, None where scores come from weights or gradients alone."""
        scorer = self.scorer
        if isinstance(scorer, StateScorer):
            return scorer
        if not isinstance(scorer, ModelScorer):
            problem = f"gives as `scorer` a {type(scorer).__name__} without such methods"
            raise _without_scorer(self, problem)
        return None

    def _digest(self) -> str:
        """What identifies the method: a killed pass goes on only for an equal one."""
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return json.dumps([name, type(self).VERSION, asdict(self)], sort_keys=True, default=str)


def _without_scorer(method: WidthMethod, problem: str) -> PlanError:
    return PlanError(
        type(method).__name__,
        f"{problem}, expected what scores its units",
        "define the property `scorer`: an object with `watch` and `score` for scores of states, or "
        "with `passes` and `scores` for those of weights",
    )
