"""The package's own model types, and their registration with transformers.

Whatever of this package opens a checkpoint registers them first. For others, `import prune_export`
does so when transformers' automatic classes are imported already, and `register()` does at any
time. An import hook would spare that order; it was tried and given up, as transformers' modules
import each other in their middle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent
"""Where the files lie that are put beside a checkpoint of such a type."""

_STEMS: Final = ("Llama", "Mistral", "Qwen2", "Qwen3")

_UNLISTED: Final = {"mistral4": "Mistral4ForCausalLM"}
"""Language models of transformers that `AutoModelForCausalLM` does not list (5.23), by type."""


def register() -> None:
    """Registers the model types with transformers' automatic classes; imports transformers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from prune_export.modeling import configuration_sliced

    for stem in _STEMS:
        config: Any = getattr(configuration_sliced, f"Sliced{stem}Config")
        stand_in = type(f"Sliced{stem}ForCausalLM", (_StandIn,), {"config_class": config})
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, stand_in, exist_ok=True)
    for model_type, name in _UNLISTED.items():
        config = CONFIG_MAPPING[model_type]
        stand_in = type(name, (_StandInOfTheirs,), {"config_class": config})
        AutoModelForCausalLM.register(config, stand_in, exist_ok=True)


def register_if_imported() -> None:
    """Registers the model types if transformers' automatic classes are imported already."""
    if "transformers.models.auto.modeling_auto" in sys.modules:
        register()


class _StandIn:
    """A stand-in for a model class, whose module is imported only when it is used."""

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


class _StandInOfTheirs(_StandIn):
    """The same for a class of transformers."""

    @classmethod
    def _own(cls) -> Any:
        import transformers

        return getattr(transformers, cls.__name__)
