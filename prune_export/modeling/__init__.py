"""Model types of our own, known to transformers as soon as `prune_export` is imported.

Importing this is cheap: transformers is not imported for it. When somebody else imports its
automatic classes, or already has, the types are registered there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
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
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)
        _watch.there |= {_CONFIGS, _MODELS} & sys.modules.keys()
    _watch.go_on()


class _StandIn:
    """Makes models of the class that has its name, as the automatic classes ask for them.

    A model's own module may be what is just being imported when its type is registered.
    """

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


class _Watch(MetaPathFinder):
    """Sees the automatic classes being imported, and registers when all that it needs is there.

    Importing one module of transformers imports others in its middle, so what registering needs may
    be there only in part. It is then tried again when the next module is looked for.
    """

    def __init__(self) -> None:
        self.there: set[str] = set()
        """Which of the automatic classes' modules have been executed."""
        self._done: set[str] = set()
        self._busy = False
        self._asked: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if not name.startswith("transformers.") or name in self._asked:
            return None
        self.go_on()
        if name not in (_CONFIGS, _MODELS):
            return None
        self._asked.add(name)
        try:
            spec = find_spec(name)
        finally:
            self._asked.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, partial(self._executed, name))
        return spec

    def _executed(self, name: str) -> None:
        self.there.add(name)
        self.go_on()

    def go_on(self) -> None:
        """Registers what can be, and is not yet."""
        if self._busy:
            return
        self._busy = True
        try:
            for name, register_them in ((_CONFIGS, _configs), (_MODELS, _models)):
                if name not in self.there:
                    return
                if name not in self._done:
                    register_them()
                    self._done.add(name)
        except ImportError:
            return  # something is there only in part: the next import tries again
        finally:
            self._busy = False
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    for config in _classes():
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _models() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    for config in _classes():
        name = config.__name__.replace("Config", "ForCausalLM")
        stand_in = type(name, (_StandIn,), {"config_class": config})
        AutoModelForCausalLM.register(config, stand_in, exist_ok=True)


def _classes() -> list[Any]:
    from prune_export.modeling import configuration_sliced

    return [getattr(configuration_sliced, f"Sliced{stem}Config") for stem in _STEMS]


class _Then(Loader):
    """Another module's loader, and what follows it."""

    def __init__(self, own: Loader, then: Callable[[], None]) -> None:
        self._own, self._then = own, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        self._then()


_watch: Final = _Watch()
