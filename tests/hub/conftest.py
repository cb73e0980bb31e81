"""A result to publish, for all tests of the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.hub.made import make_result


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_result(tmp_path_factory.mktemp("hub") / "out")


@pytest.fixture
def result(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "out"))
