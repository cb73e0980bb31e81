"""What a method sees of a model when it decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prune_export.arch import Arch
from prune_export.calibrate.statistics import Statistic
from prune_export.checkpoint import Checkpoint


@dataclass(frozen=True)
class ModelView:
    """A model's shapes, its weights (read on demand) and the statistics that were asked for."""

    arch: Arch
    checkpoint: Checkpoint
    results: Mapping[Statistic, Any]

    def stat(self, statistic: Statistic) -> Any:
        """The result of a statistic.

        Raises:
            KeyError: the method did not ask for it in `statistics`.
        """
        return self.results[statistic]
