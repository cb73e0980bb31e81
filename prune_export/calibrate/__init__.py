"""Token sets, statistics and the stream that gathers them with one block in memory."""

from prune_export.calibrate.statistics import Statistic
from prune_export.calibrate.tokens import TokenSet
from prune_export.calibrate.view import ModelView

__all__ = ["ModelView", "Statistic", "TokenSet"]
