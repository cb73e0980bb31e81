"""Model types of our own, known to transformers as soon as `prune_export` is imported.

Importing this is cheap: transformers is not imported for it. When somebody else imports its
automatic classes, or already has, the types are registered there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

FOLDER: Final = Path(__file__).parent
"""Where the files lie that are put beside a checkpoint of such a type."""

_CONFIGS: Final = "transformers.models.auto.configuration_auto"
_MODELS: Final = "transformers.models.auto.modeling_auto"
_STEMS: Final = ("Llama", "Mistral", "Qwen2", "Qwen3")


def register() -> None:
    """Makes transformers' automatic classes know the model types, now or when they are imported."""
    for name, then in ((_CONFIGS, _register_configs), (_MODELS, _register_models)):
        if name in sys.modules:
            then()
        else:
            sys.meta_path.insert(0, _WhenImported(name, then))


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from prune_export.modeling import configuration_sliced

    found = [getattr(configuration_sliced, f"Sliced{stem}Config") for stem in _STEMS]
    for config in found:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    _there.configs = found
    _register_both()


def _register_models() -> None:
    _there.models = True
    _register_both()


def _register_both() -> None:
    """Registers models once both are there: importing either may import the other in its middle.

    By stand-ins: a model's own module may be what is just being imported.
    """
    if not _there.models:
        return
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    for config in _there.configs:
        name = config.__name__.replace("Config", "ForCausalLM")
        stand_in = type(name, (_StandIn,), {"config_class": config})
        AutoModelForCausalLM.register(config, stand_in, exist_ok=True)


@dataclass
class _There:
    """What of transformers, and of ours for it, has been imported to its end."""

    configs: list[Any] = field(default_factory=list)
    models: bool = False


_there = _There()


class _StandIn:
    """Makes models of the class that has its name, as the automatic classes ask for them."""

    @classmethod
    def _own(cls) -> Any:
        from prune_export.modeling import modeling_sliced

        return getattr(modeling_sliced, cls.__name__)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._own().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._own()._from_config(*args, **kwargs)


class _WhenImported(MetaPathFinder):
    """Lets a module be imported as always, and does something right afterwards."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self._then)
        return spec


class _Then(Loader):
    """Another module's loader, and what follows it."""

    def __init__(self, own: Loader, then: Callable[[], None]) -> None:
        self._own, self._then = own, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        self._then()
