"""Plans a recipe: the shapes after each stage, and its memory, disk and time.

Only the config, the safetensors headers, the recipe and as much text as shows that there is enough
are looked at, so a plan takes seconds for a model of any size, and works for one that is only a
config. Whatever can be known to fail, fails here as a `PlanError`, with nothing written.
"""

from prune_export.planning.data import CALIBRATION, sets_of
from prune_export.planning.devices import TFLOPS, Devices
from prune_export.planning.fitting import fit_time
from prune_export.planning.making import make_plan
from prune_export.planning.own_data import data_notes, with_own_samples, with_text
from prune_export.planning.planned import Plan, PlannedStage, Rates, Size, how_busy
from prune_export.planning.teacher import refuse_other_vocabulary

__all__ = [
    "CALIBRATION",
    "TFLOPS",
    "Devices",
    "Plan",
    "PlannedStage",
    "Rates",
    "Size",
    "data_notes",
    "fit_time",
    "how_busy",
    "make_plan",
    "refuse_other_vocabulary",
    "sets_of",
    "with_own_samples",
    "with_text",
]
