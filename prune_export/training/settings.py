"""The keys that healers share, and what follows from them alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from prune_export.errors import PlanError
from prune_export.training.losses.objective import NEXT_TOKEN, Distill, Objective, distill_of
from prune_export.training.zeros import KeepZeros

_WARMUP_SHARE: Final = 0.1
"""The most of a run that warm-up may take: 100 steps of warm-up in 120 would train nothing."""


@dataclass(frozen=True)
class Training:
    """How a model is trained, whatever of it. Defaults are those of Gromov et al. (2403.17887)."""

    steps: Annotated[int, Field(gt=0, description="Optimizer steps.")] = 5000
    batch: Annotated[int, Field(gt=0, description="Windows in an optimizer step.")] = 16
    micro_batch: Annotated[
        int | None,
        Field(
            gt=0,
            description="Windows that are in memory at once, a divisor of `batch`; null chooses "
            "what fits.",
        ),
    ] = None
    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 3e-4
    schedule: Annotated[
        Literal["cosine", "linear", "constant"],
        Field(description="How the learning rate falls to 0 after warm-up, if it does."),
    ] = "cosine"
    warmup: Annotated[
        int,
        Field(
            ge=0,
            description="Steps in which the learning rate rises; at most a tenth of `steps` is "
            "taken, and the log says how many.",
        ),
    ] = 100
    weight_decay: Annotated[
        float, Field(ge=0, description="AdamW's weight decay, on what is trained alone.")
    ] = 0.0
    seed: Annotated[
        int,
        Field(ge=0, description="Decides the order of the data, dropout, and adapters' start."),
    ] = 0
    max_grad_norm: Annotated[
        float, Field(gt=0, description="Gradients are clipped to this norm.")
    ] = 1.0
    gradient_checkpointing: Annotated[
        Literal["auto"] | bool,
        Field(
            description="Recompute activations instead of keeping them: about a third slower, and "
            "far less memory. `auto` does it only where a window would not fit without."
        ),
    ] = "auto"
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="What the model computes in; what is trained is float32 always. `auto` is "
            "bfloat16 where the hardware has it (CUDA, or a CPU with AMX or AVX512-BF16), else "
            "float32."
        ),
    ] = "auto"
    keep_zeros: Annotated[
        KeepZeros,
        Field(
            description="Leave weights alone that are zero, in the training and in the merge. "
            "`auto` does it in each matrix that is pruned: 5 % or more of it is zero. Dropout then "
            "removes the same inputs of an adapter for all tokens of a micro-batch."
        ),
    ] = "auto"
    layerdrop: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="Probability with which a forward pass of the training leaves a block out "
            "(LayerDrop; 0.1 to 0.2). Makes little of an existing model robust to lost blocks.",
        ),
    ] = 0.0
    save_every: Annotated[
        int | None,
        Field(
            gt=0,
            description="Steps between two checkpoints of the training, which do not change its "
            "numbers; null saves about twice a minute.",
        ),
    ] = None
    # Left out where it has its default: keys are part of what names an artifact, and what was
    # healed before there were others is to be found.
    objective: Annotated[
        Objective,
        Field(
            description="What it is trained for: `next_token`, or `distill`, to say what a teacher "
            "says; `{distill: {…}}` has the keys below.",
            exclude_if=lambda value: value == NEXT_TOKEN,
        ),
    ] = NEXT_TOKEN

    def __post_init__(self) -> None:
        """Refuses values that contradict each other.

        Raises:
            PlanError: `micro_batch` does not divide `batch`, or a value is out of bounds.
        """
        for name in ("steps", "batch", "learning_rate", "max_grad_norm"):
            refuse_not_positive(self, name)
        if not 0 <= self.layerdrop < 1:
            raise PlanError("layerdrop", f"got {self.layerdrop}, expected a fraction in [0, 1)")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            fitting = [n for n in range(1, self.batch + 1) if self.batch % n == 0]
            raise PlanError(
                "micro_batch",
                f"got {self.micro_batch}, which does not divide batch = {self.batch}",
                f"write one of {', '.join(map(str, fitting))}, or null to choose what fits",
            )

    @property
    def distill(self) -> Distill | None:
        """How it distils; None where it is trained on next tokens."""
        return distill_of(self.objective)

    @property
    def taught(self) -> bool:
        """Whether it learns from a teacher."""
        return self.distill is not None

    @property
    def teacher(self) -> str | None:
        """A directory below the data root, or a Hub id; None: the model the recipe starts from."""
        return self.distill.teacher if self.distill else None

    def described(self) -> dict[str, Any]:
        """The keys as plain data, that of the objective only where there was none before."""
        known = dataclasses.asdict(self)
        if self.distill is None:
            known.pop("objective")
        else:
            known["objective"] = {"distill": self.distill.model_dump(mode="json")}
        return known

    @property
    def warmup_steps(self) -> int:
        """The number of warm-up steps: `warmup`, but at most a tenth of the run."""
        return min(self.warmup, int(self.steps * _WARMUP_SHARE))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        gone = (step - warmup) / max(1, self.steps - warmup)
        match self.schedule:
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * gone))
            case "linear":
                return self.learning_rate * (1 - gone)
            case "constant":
                return self.learning_rate


@dataclass(frozen=True)
class Settings(Training):
    """How a low-rank adapter is trained."""

    rank: Annotated[
        int, Field(gt=0, description="Rank of the adapters. If healing overfits, sweep it down.")
    ] = 64
    alpha: Annotated[
        float | None,
        Field(gt=0, description="The update is scaled by alpha / rank; null means alpha = rank."),
    ] = None
    dropout: Annotated[
        float, Field(ge=0, lt=1, description="Dropout on what enters an adapter.")
    ] = 0.05
    targets: Annotated[
        Literal["ffn", "all", "all_but_experts"] | tuple[str, ...],
        Field(
            description="Which weights get an adapter: `ffn` (the feed-forward ones), `all` (every "
            "linear weight of the blocks), `all_but_experts` (those of a mixture share one tensor, "
            "and get none; on other models the same as `all`), or a list of roles such as "
            "`[q, v, down]`."
        ),
    ] = "ffn"

    def __post_init__(self) -> None:
        """Refuses values that contradict each other.

        Raises:
            PlanError: the list of targets is empty, or what `Training` refuses.
        """
        super().__post_init__()
        refuse_not_positive(self, "rank")
        if not 0 <= self.dropout < 1:
            raise PlanError("dropout", f"got {self.dropout}, expected a fraction in [0, 1)")
        if not self.targets:
            raise PlanError(
                "targets",
                "got an empty list",
                "write `ffn`, `all`, `all_but_experts`, or roles such as `[q, v]`",
            )

    @property
    def scaling(self) -> float:
        """The factor alpha / rank of an adapter's product."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def refuse_not_positive(settings: Training, name: str) -> None:
    """Refuses a key that must be more than 0.

    Raises:
        PlanError: it is not.
    """
    if not getattr(settings, name) > 0:
        raise PlanError(
            name, f"got {getattr(settings, name)}, expected more than 0", f"raise `{name}`"
        )


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights are held while an adapter is trained on them: 4-bit NormalFloat.

    Source: Dettmers et al., QLoRA (2305.14314), §3: NF4, blocks of 64; with `double` the scales
    are quantized to 8 bit themselves, in blocks of 256.
    """

    double: bool
    into: Literal["original", "quantized_base"]
