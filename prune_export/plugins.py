"""All that a method, a healer or an exporter outside of this package imports from it.

`contracts` says what each must have; here it is again, with what plug-ins are made of:

- a depth method: a `Statistic` such as `BlockInfluence`, and `Drop`;
- a sparse method: `CalibratedSparseMethod`, which brings the keys that all sparse methods share,
  and `zero_least` with a `Score`;
- a width method: `WidthMethod`, which brings the keys that all width methods share, and a scorer:
  a `StateScorer`, or a `ModelScorer`;
- a method of another kind: `ModelView` runs an `Editor` over the blocks, and any `Edit` is stored;
- an exporter: `load_model`, `Checkpoint`, `BuildRecord` and a `Runner`; `Trim` leaves out what is
  zero in single blocks.

`docs/your-own.md` shows one of each. What is not listed in `__all__` may change without notice.
"""

from __future__ import annotations

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import (
    AngularDistance,
    BlockInfluence,
    Edited,
    Editor,
    ExtraPass,
    Hessian,
    InputNorms,
    LinearGroup,
    ModelView,
    SequentialResult,
    SkipLoss,
    Statistic,
    TokenSet,
)
from prune_export.calibrate.streaming.linear_groups import Accumulator
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_config, load_ends, load_model, load_tokenizer
from prune_export.contracts import (
    Bounded,
    BuildRecord,
    Cost,
    Decision,
    Exporter,
    HasPlanNote,
    Healer,
    HealRecord,
    LimitsBatch,
    Method,
    Runner,
    Work,
)
from prune_export.errors import MissingExtra, PlanError, StageError
from prune_export.exporters._shared.trim import Trim
from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.pruning.sparse.sparse_method import (
    CalibratedSparseMethod,
    Score,
    zero_least,
)
from prune_export.pruning.width.scorer import ModelScorer, Scores, StateScorer
from prune_export.pruning.width.width_method import WidthMethod
from prune_export.surgery import Drop, Edit, Keep, Overwrite

__all__ = [
    "Accumulator",
    "AngularDistance",
    "Arch",
    "BlockInfluence",
    "Bounded",
    "BuildRecord",
    "CalibratedSparseMethod",
    "Checkpoint",
    "Cost",
    "Decision",
    "Drop",
    "Edit",
    "Edited",
    "Editor",
    "Exporter",
    "ExtraPass",
    "HasPlanNote",
    "HealRecord",
    "Healer",
    "Hessian",
    "InputNorms",
    "Keep",
    "LimitsBatch",
    "LinearGroup",
    "Machine",
    "Method",
    "MissingExtra",
    "ModelScorer",
    "ModelView",
    "Overwrite",
    "PlanError",
    "Progress",
    "Runner",
    "Score",
    "Scores",
    "SequentialResult",
    "SkipLoss",
    "StageError",
    "StateScorer",
    "Statistic",
    "Tensor",
    "TokenSet",
    "Trim",
    "WidthMethod",
    "Work",
    "load_config",
    "load_ends",
    "load_model",
    "load_tokenizer",
    "zero_least",
]
