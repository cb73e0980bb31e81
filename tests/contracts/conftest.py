"""Tiny random models, one of each family, for all contracts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prune_export.checkpoint import Checkpoint
from tests.arch.tiny_models import random_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(model_type: str) -> Checkpoint:
        if model_type not in made:
            path = tmp_path_factory.mktemp("tiny") / model_type
            random_model(model_type, {}, path)
            made[model_type] = Checkpoint.open(path)
        return made[model_type]

    return get
