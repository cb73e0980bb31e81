from pathlib import Path

import numpy as np
import pytest

from prune_export.machine import Machine
from tests.verify.tiny_checkpoint import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("other"), seed=1, layers=2)


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine(device="cpu", ram_bytes=4 << 30, gpu_bytes=0, threads=1)


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 48))
