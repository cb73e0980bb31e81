"""Every variant of the report, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_export.report import write_report
from tests.report.variants import VARIANTS, made

QUICK = {"full", "hostile", "no_verification", "least"}
"""The variants that are drawn in the default run; drawing takes a second each."""


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in sorted(VARIANTS)
    ],
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory into which a variant was written, named after it."""
    out = tmp_path_factory.mktemp("report") / request.param
    out.mkdir()
    write_report(made(request.param), out)
    return out
