"""The environment of the programs that build and try engines."""

from __future__ import annotations

import os
from pathlib import Path


def environment(threads: int) -> dict[str, str]:
    """This process's environment, with our package on the path, so many threads, and no network."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join((root, path)) if path else root,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(threads),
        # The builder stamps the commit of the repository around it, ours, into the graph.
        "GIT_DIR": os.devnull,
    }
