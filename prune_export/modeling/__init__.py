"""Model types of our own, known to transformers as soon as `prune_export` is imported.

Importing this is cheap: transformers is not imported for it. When somebody else imports its
automatic classes, or already has, the types are registered there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

FOLDER: Final = Path(__file__).parent
"""Where the files lie that are put beside a checkpoint of such a type."""

_CONFIGS: Final = "transformers.models.auto.configuration_auto"
_STEMS: Final = ("Llama", "Mistral", "Qwen2", "Qwen3")


def register() -> None:
    """Makes transformers' automatic classes know the model types, now or when they are imported."""
    if _CONFIGS in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from prune_export.modeling import modeling_sliced

    for stem in _STEMS:
        config: Any = getattr(modeling_sliced, f"Sliced{stem}Config")
        model: Any = getattr(modeling_sliced, f"Sliced{stem}ForCausalLM")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


class _WhenImported(MetaPathFinder):
    """Lets the automatic classes be imported as always, and registers right afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name != _CONFIGS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Another module's loader, and what follows it."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _register()
