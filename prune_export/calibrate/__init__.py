"""Token sets, statistics and the stream that gathers them with one block in memory."""

from prune_export.calibrate.data.files import inside, local_files
from prune_export.calibrate.data.sources import (
    changed_since_first,
    refuse_short,
    refuse_unreadable,
    token_set,
)
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.data.tokenizer import Tokenizer, refuse_unknown_tokens
from prune_export.calibrate.passes.ablation import Removals, native_dtype
from prune_export.calibrate.passes.cost import PassCost, block_bytes, parked_bytes, pass_cost
from prune_export.calibrate.passes.dense_reference import DENSE_STATES, added_times, has_target
from prune_export.calibrate.passes.gradients import (
    GradientReader,
    Gradients,
    Sums,
    gradients,
    spooled_bytes,
)
from prune_export.calibrate.passes.layer_merge import Chain, Folded, Layer
from prune_export.calibrate.passes.norm_correction import Corrected
from prune_export.calibrate.passes.seam_refit import (
    SEAM_STATES,
    CutModel,
    Repaired,
    held_out,
    repair,
)
from prune_export.calibrate.passes.seams import Seam, seams_of
from prune_export.calibrate.passes.sequential import Order, Swept, sweep
from prune_export.calibrate.passes.sequential_block import Edited, Editor
from prune_export.calibrate.passes.statistics import gather, refuse_unknown
from prune_export.calibrate.statistics.angular_distance import AngularDistance
from prune_export.calibrate.statistics.api import Collector, Further, Scope, Statistic
from prune_export.calibrate.statistics.block_influence import BlockInfluence
from prune_export.calibrate.statistics.norm_energy import NormShares, Shares
from prune_export.calibrate.statistics.norm_input_covariance import Grams, JunctionGrams
from prune_export.calibrate.statistics.skip_loss import BypassLoss, BypassLosses
from prune_export.calibrate.streaming.linear_groups import (
    SITES,
    Gram,
    Site,
    Squares,
    as_matrix,
    inputs_last,
    inputs_of,
    linears,
    sites_of,
)
from prune_export.calibrate.streaming.skip import OUTPUTS, Part, Unit
from prune_export.calibrate.view import Engines, Means, ModelView

__all__ = [
    "DENSE_STATES",
    "OUTPUTS",
    "SEAM_STATES",
    "SITES",
    "AngularDistance",
    "BlockInfluence",
    "BypassLoss",
    "BypassLosses",
    "Chain",
    "Collector",
    "Corrected",
    "CutModel",
    "Edited",
    "Editor",
    "Engines",
    "Folded",
    "Further",
    "GradientReader",
    "Gradients",
    "Gram",
    "Grams",
    "JunctionGrams",
    "Layer",
    "Means",
    "ModelView",
    "NormShares",
    "Order",
    "Part",
    "PassCost",
    "Removals",
    "Repaired",
    "Scope",
    "Seam",
    "Shares",
    "Site",
    "Squares",
    "Statistic",
    "Sums",
    "Swept",
    "TokenSet",
    "Tokenizer",
    "Unit",
    "added_times",
    "as_matrix",
    "block_bytes",
    "changed_since_first",
    "gather",
    "gradients",
    "has_target",
    "held_out",
    "inputs_last",
    "inputs_of",
    "inside",
    "linears",
    "local_files",
    "native_dtype",
    "parked_bytes",
    "pass_cost",
    "refuse_short",
    "refuse_unknown",
    "refuse_unknown_tokens",
    "refuse_unreadable",
    "repair",
    "seams_of",
    "sites_of",
    "spooled_bytes",
    "sweep",
    "token_set",
]
