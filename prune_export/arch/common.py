"""Config keys that any family may carry, and how values of a config are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict


class Common(BaseModel):
    """Config keys that any family may carry: harmless, limited to values, or refused with advice.

    A refused key is let pass where it is null or empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    known: list[str]
    accepts: dict[str, list[Any]]
    refuses: dict[str, str]

    def keys(self) -> frozenset[str]:
        """Every key that stands here."""
        return frozenset({*self.known, *self.accepts, *self.refuses})


def parse_yaml(text: str) -> Any:
    """Parses YAML data, by libyaml where it is there: it takes a tenth of the time."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


@cache
def common() -> Common:
    """Loads the rules of `families/_common.yaml` for config keys that any family may carry."""
    text = files("prune_export.arch").joinpath("families/_common.yaml").read_text(encoding="utf-8")
    return Common.model_validate(parse_yaml(text))


def is_among(got: Any, accepted: Iterable[Any]) -> bool:
    """Whether a config's value is one of those accepted; nested configs may have common keys."""
    return any(_own(got) == _own(one) for one in accepted)


def _own(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    skip = common().keys()
    return {str(key): _own(one) for key, one in value.items() if key not in skip}
