"""Looks at a checkpoint of a larger model (of images and text) as its language model alone.

Config and tensors are given the names that the language model has by itself, so that whatever reads
a plain model reads this one: no weight of the other parts is ever loaded. Writing puts the changed
text config and tensors back in their places and carries everything else along byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from prune_export.arch.table import Table
from prune_export.arch.wrappers import TEXT, Within, Wrapper, wrapper_of
from prune_export.checkpoint.config import filled_config
from prune_export.checkpoint.header import Entry
from prune_export.errors import CheckpointError

_PREFIXES: Final = ("model.language_model", "language_model.model", "model.text_model", "model")
"""Where releases of transformers store the language model, before its own names."""

_HEADS: Final = ("lm_head", "language_model.lm_head")
_OWN_HEAD: Final = "lm_head"
_CODE_KEYS: Final = ("auto_map", "_name_or_path")


@dataclass(frozen=True)
class Wrapped:
    """What surrounds a language model in its checkpoint.

    `config` is the whole config.json; `prefix` and `head` are what its files have for `own`, the
    first module of the language model by itself (`model`), and for `lm_head`; `carried` are the
    tensors of the other parts, by their stored names.
    """

    wrapper: Wrapper
    config: Mapping[str, Any]
    within: Within
    own: str = "model"
    prefix: str = "model"
    head: str = "lm_head"
    carried: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The type of the larger model."""
        return self.within.wrapper

    @property
    def carried_bytes(self) -> int:
        """The bytes of the tensors of the other parts."""
        return sum(entry.nbytes for entry in self.carried.values())

    def stored_name(self, name: str) -> str:
        """The name in the files of a tensor of the language model."""
        if name.startswith(f"{_OWN_HEAD}."):
            return f"{self.head}.{name.removeprefix(f'{_OWN_HEAD}.')}"
        return f"{self.prefix}.{name.removeprefix(f'{self.own}.')}"

    def renaming(self) -> dict[str, str]:
        """Patterns of stored names and what transformers shall read them as (`key_mapping`)."""
        from re import escape

        pairs = ((self.prefix, self.own), (self.head, _OWN_HEAD))
        return {f"^{escape(old)}\\.": f"{new}." for old, new in pairs if old != new}

    def whole_config(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the larger model, whose language model was `before` and is `after`."""
        config = {key: one for key, one in self.config.items() if key not in _CODE_KEYS}
        return self.wrapper.written(config, before, after)


def unwrap(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], Wrapped | None]:
    """Gives the language model's config, and what surrounds it; of a plain model its own, and None.

    Raises:
        UnsupportedArch, CheckpointError: transformers does not know, or refuses, the config.
    """
    wrapper = wrapper_of(config)
    if wrapper is None or not wrapper.holds_text(config):
        return config, None
    text = config.get(TEXT)
    named = text.get("model_type", "") if isinstance(text, dict) else ""
    if not isinstance(named, str):
        raise CheckpointError(
            f"{path / 'config.json'}  {TEXT}.model_type",
            f"got {named!r:.60}, expected the name of a model type",
            "correct the value, or fetch the file again",
        )
    full = filled_config(config, path) if wrapper.reads_as or wrapper.feeds else config
    within = wrapper.within(str(config["model_type"]), full)
    return wrapper.text_config(full), Wrapped(wrapper, config, within)


def part(
    entries: Mapping[str, Entry], table: Table, wrapped: Wrapped, path: Path
) -> tuple[dict[str, Entry], Wrapped]:
    """Parts stored tensors into the language model's, by its own names, and those carried along.

    Raises:
        CheckpointError: no language model is found among them.
    """
    own, _, list_of_blocks = table.blocks.rpartition(".")
    outside = {
        row.name.removeprefix(f"{own}.").partition(".")[0] for row in (*table.head, *table.tail)
    }
    first = {list_of_blocks, *outside}

    def holds(prefix: str) -> bool:
        return any(name.startswith(f"{prefix}.{list_of_blocks}.0.") for name in entries)

    prefix = next(filter(holds, _PREFIXES), None)
    if prefix is None:
        raise CheckpointError(
            f"{path}  {_PREFIXES[0]}.{list_of_blocks}.0",
            f"is missing: a {wrapped.model_type} model keeps the blocks of its language model "
            f"there, or under {', '.join(_PREFIXES[1:])}",
            "fetch the whole model; config.json and the weights must be of the same model",
        )
    usual = _HEADS[1] if prefix == _PREFIXES[1] else _HEADS[0]
    found = [head for head in _HEADS if f"{head}.weight" in entries]
    wrapped = replace(wrapped, own=own, prefix=prefix, head=found[0] if found else usual)
    text: dict[str, Entry] = {}
    carried: dict[str, Entry] = {}
    for name, entry in entries.items():
        rest = name.removeprefix(f"{prefix}.")
        if table.further and name.startswith(tuple(table.further.prefixes)):
            text[name] = entry  # left behind, as of a plain model
        elif rest != name and (prefix != own or rest.partition(".")[0] in first):
            text[f"{own}.{rest}"] = entry
        elif name.startswith(f"{wrapped.head}."):
            text[f"{_OWN_HEAD}.{name.removeprefix(f'{wrapped.head}.')}"] = entry
        else:
            carried[name] = entry
    return text, replace(wrapped, carried=carried)
