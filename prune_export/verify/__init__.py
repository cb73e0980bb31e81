"""Measures what is claimed: reload, parity, quality, speed.

A model or an engine that is measured is opened in a process of its own (`session`, `worker`), so
that this process stays small and one engine has the machine alone.
"""

from prune_export.verify.drive import tokens_without_text
from prune_export.verify.engine import Engine
from prune_export.verify.gates import perplexity_gates, placement_gates, speed_gates
from prune_export.verify.generation import measure_generation
from prune_export.verify.parity import measure_parity
from prune_export.verify.placement import measure_placement
from prune_export.verify.quality import measure_perplexity
from prune_export.verify.reload import measure_reload
from prune_export.verify.sparsity import measure_sparsity, not_from_rounding
from prune_export.verify.speed import Effort, measure_speed
from prune_export.verify.tasks import check_tasks, measure_engine_tasks, measure_tasks

__all__ = [
    "Effort",
    "Engine",
    "check_tasks",
    "measure_engine_tasks",
    "measure_generation",
    "measure_parity",
    "measure_perplexity",
    "measure_placement",
    "measure_reload",
    "measure_sparsity",
    "measure_speed",
    "measure_tasks",
    "not_from_rounding",
    "perplexity_gates",
    "placement_gates",
    "speed_gates",
    "tokens_without_text",
]
