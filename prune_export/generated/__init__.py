"""What a model says, made into data: the dense model itself, an engine, or a server.

`prompts` (what is asked), `local` (a model or an engine in a process of its own), `server` (over
HTTP), `journal` (each answer is kept as it comes), `cost` (what `plan` says), and `making` (the
whole).
"""

from prune_export.generated.cost import Talk, talk_of
from prune_export.generated.making import ANSWERS, Speaker, generate
from prune_export.generated.server import refuse_unasked

__all__ = ["ANSWERS", "Speaker", "Talk", "generate", "refuse_unasked", "talk_of"]
