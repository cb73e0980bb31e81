"""What all sparse methods share: the recipe keys for sparsity and targets, masking, and the log.

A method adds what it scores weights by. `Masker` is the editor of those that only put zeros in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import (
    CorrectedNorms,
    Edited,
    ExtraPass,
    InputNorms,
    LinearGroup,
    ModelView,
    Order,
    SequentialResult,
    inputs_of,
)
from prune_export.contracts import Decision
from prune_export.errors import PlanError, StageError
from prune_export.pruning.sparse import free_channels, owl, sequential_cost
from prune_export.pruning.sparse.free_channels import Channels
from prune_export.pruning.sparse.masks import Amount, Compare, keep_only, summary
from prune_export.pruning.sparse.targets import (
    Roles,
    check_widths,
    chosen_matrices,
    refuse_unknown_roles,
)
from prune_export.sparsity.nm import Nm
from prune_export.surgery import Edit, Overwrite

_CORRECTED: Final = ("attention.out", "linear.out", "mlp.out")
"""Linear groups whose inputs come from pruned matrices of the same block."""

NO_SPEEDUP: Final = (
    "zeros without a pattern make the model smaller only when compressed: no maintained runtime "
    "multiplies faster for them at this sparsity"
)


@dataclass(frozen=True)
class SparseMethod:
    """How sparse the model becomes: a fraction or an N:M pattern, of which matrices.

    Every sparse method is one, so these are keys of them all.

    Raises:
        PlanError: no amount or two, an unknown role, or OWL where it cannot be.
    """

    sparsity: Annotated[
        float | None, Field(gt=0, lt=1, description="Fraction of the weights that become zero.")
    ] = None
    nm: Annotated[
        Nm | None,
        Field(description="A pattern along the input, such as `{keep: 2, of: 4}`."),
    ] = None
    include: Annotated[
        Roles | None,
        Field(min_length=1, description="Roles to prune (`q`, `down` …); else all of the blocks."),
    ] = None
    exclude: Annotated[Roles, Field(description="Roles to leave as they are.")] = ()
    layers: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None,
        Field(min_length=1, description="Blocks to prune, counted from 0; else all."),
    ] = None
    allocation: Annotated[
        Literal["uniform", "owl"],
        Field(description="`owl` spares blocks in which more scores are outliers."),
    ] = "uniform"
    owl_spread: Annotated[
        float, Field(gt=0, lt=0.5, description="How far a block may be from the mean, by `owl`.")
    ] = 0.08
    owl_outlier: Annotated[
        float, Field(gt=1, description="Times the block's mean score at which one is an outlier.")
    ] = 5.0
    permute: Annotated[
        bool,
        Field(
            description="With `nm`: first put channels in an order in which the pattern costs "
            "less, where that is free at run time: the inputs of down and o, with the rows that "
            "make them."
        ),
    ] = False

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.nm is None):
            raise PlanError(
                "how many weights",
                f"got {'neither `sparsity` nor `nm`' if self.nm is None else 'both of them'}, "
                "expected one of `sparsity` and `nm`",
                "write `sparsity: 0.5`, or `nm: {keep: 2, of: 4}`",
            )
        refuse_unknown_roles(self.include, self.exclude)
        if self.allocation == "owl":
            self._check_owl()
        if self.permute and self.nm is None:
            raise PlanError(
                "permute",
                "got true without `nm`; zeros without a pattern don't depend on an order",
                "write `nm: {keep: 2, of: 4}` instead of `sparsity`, or leave `permute` out",
            )

    def _check_owl(self) -> None:
        if self.sparsity is None:
            raise PlanError(
                "allocation: owl",
                f"got `nm: {{{self.nm}}}`, which is the same in every block",
                "write `sparsity: …` instead of `nm`, or `allocation: uniform`",
            )
        room = min(self.sparsity, 1 - self.sparsity)
        if 2 * self.owl_spread >= room:
            raise PlanError(
                "allocation: owl",
                f"got owl_spread {self.owl_spread}, with which a block could lose less than "
                f"nothing or all of its weights at sparsity {self.sparsity}",
                f"write `owl_spread: {room / 2.5:.2g}` or less",
            )

    def targets(self, arch: Arch) -> tuple[Tensor, ...]:
        """The matrices that are pruned.

        Raises:
            PlanError: a role or a block that the model does not have, or nothing is left.
        """
        return chosen_matrices(arch, self.include, self.exclude, self.layers)

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The calibration pass of OWL, where it is used."""
        return (sequential_cost.of(arch, "sequential"),) if self.allocation == "owl" else ()

    def predict(self, arch: Arch) -> Arch:
        """The shapes stay.

        Raises:
            PlanError: the pattern's groups do not divide a matrix's inputs.
        """
        widths = {tensor.name: inputs_of(arch, tensor) for tensor in self.targets(arch)}
        if self.nm is not None:
            check_widths(self.nm, widths)
        return arch

    def channels(self, arch: Arch) -> dict[str, Channels]:
        """The channels that may be permuted, by the matrix whose inputs they are."""
        if self.nm is None or not self.permute:
            return {}
        return free_channels.of_all(arch, self.targets(arch), self.nm)

    def amounts(self, model: ModelView) -> tuple[dict[int, Amount], Mapping[str, Any]]:
        """The sparsity of each block's matrices, and JSON about why."""
        layers = range(model.arch.layers)
        if self.nm is not None:
            return dict.fromkeys(layers, self.nm), {}
        assert self.sparsity is not None
        if self.allocation == "uniform":
            return dict.fromkeys(layers, self.sparsity), {}
        found = owl.allocate(
            model, self.targets(model.arch), self.sparsity, self.owl_spread, self.owl_outlier
        )
        return dict(found.sparsity), found.log


@dataclass(frozen=True)
class CalibratedSparseMethod(SparseMethod):
    """A sparse method whose scores need activations from calibration data."""

    order: Annotated[
        Order,
        Field(
            description="`sequential`: each matrix sees what earlier pruned ones of its block "
            "give, in one pass; `block`: all see the dense block, as in published figures."
        ),
    ] = "sequential"

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The passes that `decide` runs."""
        return (
            *super().statistics(arch),
            sequential_cost.of(arch, self.order, permutes=self.permute),
        )


Score = Callable[[torch.Tensor, InputNorms, Tensor], torch.Tensor]
"""The score of each weight `[out, in]`: of a matrix in float32, its inputs, and which one it is.

The least scores go. `InputNorms` holds `sums`, `[in]`, the inputs' squares summed over `tokens`."""


@dataclass(frozen=True)
class Masker:
    """Zeroes the weights with the least scores; an expert that no token reached, by magnitude."""

    key: str
    targets: frozenset[str]
    amounts: Mapping[int, Amount]
    score: Score
    compare: Compare = "row"
    channels: Mapping[str, Channels] = field(default_factory=dict)
    corrects: bool = False

    def watch(self, group: LinearGroup, width: int, device: str) -> InputNorms | None:
        """Accumulates input norms for a linear group of which a matrix is pruned."""
        if not any(tensor.name in self.targets for tensor in group.tensors):
            return None
        # To an expert, other tokens would be routed.
        corrected = self.corrects and group.kind in _CORRECTED and group.expert is None
        return CorrectedNorms(width, device) if corrected else InputNorms(width, device)

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: InputNorms
    ) -> Edited:
        """Masks the matrices of a linear group."""
        made, log, orders = {}, {}, {}
        for tensor in group.tensors:
            if tensor.name in self.targets:
                channels = self.channels.get(tensor.name)
                weight = weights[tensor.name]
                scores = self._scores(weight, seen, tensor)
                kept, orders[tensor.name] = free_channels.mask(
                    channels, scores, self.amounts[group.layer], self.compare
                )
                made[tensor.name] = keep_only(weight, kept)
                log[tensor.name] = summary(weight, scores, kept=kept)
        return Edited(made, {"tensors": log, "tokens": seen.tokens, "orders": orders})

    def _scores(self, weight: torch.Tensor, seen: InputNorms, tensor: Tensor) -> torch.Tensor:
        if not seen.tokens:
            return weight.abs()
        scores = self.score(weight, seen, tensor)
        at = weight.data_ptr()  # 0 of a tensor whose memory is none of the process's
        written = scores is weight or (at != 0 and scores.data_ptr() == at)
        if scores.shape != weight.shape or written:
            raise StageError(
                f"score of {tensor.name}",
                f"got {list(scores.shape)}, expected new values {list(weight.shape)}: one of each "
                "weight, and the matrix as it was",
                "let `score` return a tensor of its own, `[out, in]` as the matrix that it gets",
            )
        return scores


def zero_least(
    method: CalibratedSparseMethod,
    model: ModelView,
    score: Score,
    compare: Compare = "row",
    *,
    corrects: bool = False,
) -> Decision:
    """Decides by a sequential pass that zeroes the weights where `score` is least.

    With `corrects`, norms in the true order are corrected for the noise of pruning (ADR 0019).
    """
    amounts, why = method.amounts(model)
    names = frozenset(tensor.name for tensor in method.targets(model.arch))
    key, channels = key_of(method, amounts), method.channels(model.arch)
    masker = Masker(key, names, amounts, score, compare, channels, corrects)
    return sequential_decision(method, model, model.sequential(masker, method.order), why)


def key_of(method: SparseMethod, amounts: Mapping[int, Amount]) -> str:
    """JSON that identifies what a method's editor does."""
    return f"{type(method).__name__} {method.VERSION} {method} {dict(amounts)}"  # type: ignore[attr-defined]


def sequential_decision(
    method: CalibratedSparseMethod,
    model: ModelView,
    result: SequentialResult,
    why: Mapping[str, Any],
) -> Decision:
    """Makes the decision from the result of a sequential pass: edits and log."""
    groups = [group for log in result.logs for group in log.values()]
    logs = {name: own for group in groups for name, own in group["tensors"].items()}
    unseen = [name for group in groups if not group["tokens"] for name in group["tensors"]]
    more = {"order": method.order, **why}
    if unseen:
        more["by_magnitude_for_want_of_tokens"] = unseen
    edits = tuple(Overwrite(name, read) for name, read in result.values())
    orders = {name: own for group in groups for name, own in group["orders"].items() if own}
    return permuted(method, model, edits, logs, more, orders)


def permuted(
    method: SparseMethod,
    model: ModelView,
    edits: tuple[Overwrite, ...],
    tensors: Mapping[str, Any],
    why: Mapping[str, Any],
    orders: Mapping[str, Any],
) -> Decision:
    """Makes the decision with channels permuted as `free_channels.mask` noted, by matrix."""
    if not orders:
        return decision(method, edits, tensors, why)
    channels = method.channels(model.arch)
    placed, logs, gain = free_channels.placed(
        channels, orders, edits, tensors, model.checkpoint.read
    )
    return decision(method, placed, logs, {**why, "permuted": gain})


def decision(
    method: SparseMethod, edits: Iterable[Edit], tensors: Mapping[str, Any], why: Mapping[str, Any]
) -> Decision:
    """Makes the decision: edits, and the log that every sparse method has."""
    removed = sum(own["zeros"] for own in tensors.values())
    weights = sum(own["weights"] for own in tensors.values())
    digests = "".join(own["digest"] for own in tensors.values())
    log = {
        "pattern": str(method.nm) if method.nm else f"{method.sparsity} unstructured",
        "sparsity": removed / weights,
        "zeros": removed,
        "weights": weights,
        "mask_digest": hashlib.sha256(digests.encode()).hexdigest(),
        **why,
        "notes": [] if method.nm else [NO_SPEEDUP],
        "tensors": dict(tensors),
    }
    return Decision(edits, log)
