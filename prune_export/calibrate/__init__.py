"""Token sets, statistics and the stream that gathers them with one block in memory."""

from prune_export.calibrate.angular_distance import AngularDistance
from prune_export.calibrate.block_influence import BlockInfluence
from prune_export.calibrate.bypass_loss import BypassLoss, BypassLosses
from prune_export.calibrate.cost import PassCost, pass_cost
from prune_export.calibrate.data import token_set
from prune_export.calibrate.statistics import Collector, Further, Scope, Statistic
from prune_export.calibrate.stream import gather
from prune_export.calibrate.tokens import TokenSet
from prune_export.calibrate.view import Means, ModelView

__all__ = [
    "AngularDistance",
    "BlockInfluence",
    "BypassLoss",
    "BypassLosses",
    "Collector",
    "Further",
    "Means",
    "ModelView",
    "PassCost",
    "Scope",
    "Statistic",
    "TokenSet",
    "gather",
    "pass_cost",
    "token_set",
]
