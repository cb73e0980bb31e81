from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.saved_models import maker


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return maker(tmp_path_factory.mktemp)
