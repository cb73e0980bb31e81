"""The kernel, compiled once for these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_export.kernels import LIBRARY, Library, compile_library
from prune_export.kernels.compiling import compiler


@pytest.fixture(scope="session")
def kernel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler() is None:
        pytest.skip("there is no C++ compiler on the PATH, and the kernel is shipped as source")
    made = tmp_path_factory.mktemp("kernel") / LIBRARY
    compile_library(made)
    return made


@pytest.fixture(scope="session")
def kernel(kernel_file: Path) -> Library:
    return Library(kernel_file)
