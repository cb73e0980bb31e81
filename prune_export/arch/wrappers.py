"""Larger models that hold a language model, as data: where their config keeps the text model.

One line of `wrappers.yaml` describes a wrapper (gemma3, llava …). Of a model of such a type the
language model alone is described by a table and cut; `Within` says what of it the rest depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from prune_export.arch.common import parse_yaml
from prune_export.arch.table import tables
from prune_export.errors import PlanError

TEXT: Final = "text_config"
_TIE: Final = "tie_word_embeddings"
_DTYPES: Final = ("dtype", "torch_dtype")
_ROPE: Final = ("rope_parameters", "rope_scaling")
_MROPE: Final = ("mrope_section", "mrope_interleaved")
"""How rotary embeddings tell an image's three positions apart; on text they are all equal."""


@dataclass(frozen=True)
class Within:
    """What a larger model asks of the language model that it holds.

    `wrapper` is its type. The axes `fixed` meet its other parts, so their sizes stay. The first
    `fed` blocks have features of the image added to what they return, by their number.
    """

    wrapper: str
    fed: int = 0
    fixed: frozenset[str] = frozenset({"residual", "vocab"})

    def refuse_sizes(self, axes: Mapping[str, int]) -> None:
        """Refuses another size of an axis that other parts of the model depend on.

        Raises:
            PlanError: naming the axis.
        """
        for axis in sorted(self.fixed & axes.keys()):
            raise PlanError(
                f"axis {axis}",
                f"is that of other parts of this {self.wrapper} model too, which are not cut",
                "cut MLPs, heads, experts or blocks",
            )

    def refuse_layers(self, layers: set[int]) -> None:
        """Refuses dropping blocks that features of the image are added after.

        Raises:
            PlanError: naming them.
        """
        lost = sorted(layer for layer in layers if layer < self.fed)
        if lost:
            raise PlanError(
                "layers",
                f"got {lost}, but the {self.wrapper} model adds features of the image after each "
                f"of its first {self.fed} blocks, by their number",
                f"keep them: `protect_first: {self.fed}`, or list other blocks as `layers`",
            )

    def refuse_type(self, model_type: str) -> None:
        """Refuses another type of the language model.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            f"model type {model_type}",
            f"cannot be that of the language model in a {self.wrapper} model",
            "choose a method that keeps the type; or cut the language model saved alone",
        )


class Wrapper(BaseModel):
    """A type of larger model; `wrappers.yaml` says what each key means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    reads_as: str | None = None
    reads_with: dict[str, Any] = Field(default_factory=dict)
    flat: bool = False
    tied: bool = False
    tied_by_text: bool = False
    feeds: str | None = None

    def holds_text(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json of this type says what its language model is like."""
        return self.flat or isinstance(config.get(TEXT), Mapping)

    def text_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the language model alone, as a causal one of its own type.

        `config` is config.json as it stands; with `reads_as`, the full one of transformers.
        """
        said = {"architectures": [], **config[TEXT], **self.reads_with}
        said["model_type"] = self.reads_as or said.get("model_type", self.text)
        table = tables().get(said["model_type"])
        said["architectures"] = list(table.architectures[:1]) if table else []
        for key in _DTYPES:
            if config.get(key) is not None:
                said[key] = config[key]
        tied = bool(config.get(_TIE, self.tied))
        if tied or not self.tied_by_text:
            said[_TIE] = tied
        for key in _ROPE if self.reads_as else ():
            if isinstance(said.get(key), Mapping):
                said[key] = {name: own for name, own in said[key].items() if name not in _MROPE}
        return said

    def written(
        self, config: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Writes into `config` what changed from `before` to `after`, two configs of its text."""
        changed = {key: value for key, value in after.items() if before.get(key, ...) != value}
        inner = config.get(TEXT, config)
        inner = {key: value for key, value in inner.items() if key in after or key not in before}
        whole = {**config, TEXT: inner | changed} if TEXT in config else inner | changed
        return whole | {key: changed[key] for key in (_TIE,) if key in changed}

    def within(self, model_type: str, config: Mapping[str, Any]) -> Within:
        """What the larger model of this full config asks of its language model."""
        vision = config.get("vision_config")
        listed = vision.get(self.feeds) if self.feeds and isinstance(vision, Mapping) else ()
        return Within(model_type, len(listed) if isinstance(listed, list | tuple) else 0)


@cache
def wrappers() -> Mapping[str, Wrapper]:
    """Every wrapper, by model type."""
    text = files("prune_export.arch").joinpath("wrappers.yaml").read_text(encoding="utf-8")
    return {name: Wrapper.model_validate(row) for name, row in parse_yaml(text).items()}


def wrapper_of(config: Mapping[str, Any]) -> Wrapper | None:
    """Finds the wrapper that a config.json is of; None for a plain model."""
    return wrappers().get(str(config.get("model_type")))
