"""Calibration: token sets, and passes over them with one transformer block in memory at a time."""

from prune_export.calibrate.context import CalibrationContext, Engines
from prune_export.calibrate.data.documents import column_of, texts_of
from prune_export.calibrate.data.files import SUFFIXES, inside, local_files
from prune_export.calibrate.data.generated import (
    Sample,
    read_samples,
    tokens_of_samples,
    windows_of_samples,
    write_samples,
)
from prune_export.calibrate.data.parting import part_sizes
from prune_export.calibrate.data.plenty import LONG_TOKEN, Wanted, is_plenty
from prune_export.calibrate.data.sources import (
    changed_since_first,
    refuse_short,
    refuse_unreadable,
    token_set,
)
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.data.tokenizer import Tokenizer, largest_id, refuse_unknown_tokens
from prune_export.calibrate.passes.ablation import Ablations, native_dtype
from prune_export.calibrate.passes.answers import (
    KeptAnswers,
    answer_bytes,
    answers_cost,
    keep_answers,
)
from prune_export.calibrate.passes.cost import PassCost, pass_cost, suspended_bytes
from prune_export.calibrate.passes.dense_reference import DENSE_STATES, added_times, has_target
from prune_export.calibrate.passes.gradients import (
    GradientReader,
    Gradients,
    Sums,
    gradients,
    offloaded_bytes,
)
from prune_export.calibrate.passes.layer_merge import Chain, Layer, MergeSimilarity
from prune_export.calibrate.passes.norm_correction import CorrectedNorms
from prune_export.calibrate.passes.seam_refit import (
    SEAM_STATES,
    CutModel,
    Repaired,
    held_out,
    repair,
)
from prune_export.calibrate.passes.seams import Seam, seams_of
from prune_export.calibrate.passes.sequential import SequentialResult, run_sequential
from prune_export.calibrate.passes.sequential_state import Edited, Editor, Order
from prune_export.calibrate.passes.statistics import gather
from prune_export.calibrate.statistics.angular_distance import AngularDistance
from prune_export.calibrate.statistics.api import Collector, ExtraPass, Scope, Statistic
from prune_export.calibrate.statistics.block_influence import BlockInfluence
from prune_export.calibrate.statistics.norm_energy import EnergyShares, NormEnergy
from prune_export.calibrate.statistics.norm_input_covariance import Covariances, NormInputCovariance
from prune_export.calibrate.statistics.skip_loss import SkipLoss, SkipLosses
from prune_export.calibrate.streaming.driver import block_bytes, refuse_unknown
from prune_export.calibrate.streaming.linear_groups import (
    LINEAR_GROUPS,
    Hessian,
    InputNorms,
    LinearGroup,
    as_matrix,
    inputs_last,
    inputs_of,
    linear_groups,
    linears,
)
from prune_export.calibrate.streaming.skip import OUTPUTS, Part, Unit
from prune_export.calibrate.view import ModelView

__all__ = [
    "DENSE_STATES",
    "LINEAR_GROUPS",
    "LONG_TOKEN",
    "OUTPUTS",
    "SEAM_STATES",
    "SUFFIXES",
    "Ablations",
    "AngularDistance",
    "BlockInfluence",
    "CalibrationContext",
    "Chain",
    "Collector",
    "CorrectedNorms",
    "Covariances",
    "CutModel",
    "Edited",
    "Editor",
    "EnergyShares",
    "Engines",
    "ExtraPass",
    "GradientReader",
    "Gradients",
    "Hessian",
    "InputNorms",
    "KeptAnswers",
    "Layer",
    "LinearGroup",
    "MergeSimilarity",
    "ModelView",
    "NormEnergy",
    "NormInputCovariance",
    "Order",
    "Part",
    "PassCost",
    "Repaired",
    "Sample",
    "Scope",
    "Seam",
    "SequentialResult",
    "SkipLoss",
    "SkipLosses",
    "Statistic",
    "Sums",
    "TokenSet",
    "Tokenizer",
    "Unit",
    "Wanted",
    "added_times",
    "answer_bytes",
    "answers_cost",
    "as_matrix",
    "block_bytes",
    "changed_since_first",
    "column_of",
    "gather",
    "gradients",
    "has_target",
    "held_out",
    "inputs_last",
    "inputs_of",
    "inside",
    "is_plenty",
    "keep_answers",
    "largest_id",
    "linear_groups",
    "linears",
    "local_files",
    "native_dtype",
    "offloaded_bytes",
    "part_sizes",
    "pass_cost",
    "read_samples",
    "refuse_short",
    "refuse_unknown",
    "refuse_unknown_tokens",
    "refuse_unreadable",
    "repair",
    "run_sequential",
    "seams_of",
    "suspended_bytes",
    "texts_of",
    "token_set",
    "tokens_of_samples",
    "windows_of_samples",
    "write_samples",
]
