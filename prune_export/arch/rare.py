"""Parts of a table that few families have."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

PER_LAYER: str = "per_layer_config"
"""The key under which transformers writes the sizes of single layers, by their numbers."""


class Further(BaseModel):
    """Modules that predict further tokens (MTP), which transformers does not load with the model.

    `key` says how many there are; `prefixes` are those of their stored names, with `{next}` for the
    numbers that follow the last block's, as many as the key says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    prefixes: list[str]


class ByKind(BaseModel):
    """Keys of a kind of layers (`layers`, a layer set) that differ from those of the others.

    Files say them once (`global_head_dim`), transformers writes them for each such layer under
    `per_layer_config` (`head_dim`). `keys` has the name there and the name here: they are read
    from either, and written as the file had them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: str
    keys: dict[str, str]


class Derivation(BaseModel):
    """How a table was derived: by which transformers, and what was proven of it on random models.

    `unproven` has, for each use that the proof did not carry, why; such uses are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformers: str
    proven: list[str]
    unproven: dict[str, str] = Field(default_factory=dict)
