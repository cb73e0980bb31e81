from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.arch.tiny_models import Tiny, random_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Makes a tiny model, once for all tests: they leave it as they found it."""
    made: dict[str, Tiny] = {}

    def make(model_type: str, **changes: Any) -> Tiny:
        key = json.dumps([model_type, changes], sort_keys=True)
        if key not in made:
            made[key] = random_model(model_type, changes, tmp_path_factory.mktemp("dense"))
        return made[key]

    return make
