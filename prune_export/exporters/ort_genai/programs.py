"""Runs the programs beside this file, the builder and its trial, so that their memory is freed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prune_export.contracts import Work
from prune_export.errors import StageError


def run_program(
    program: str, request: Mapping[str, Any], work: Work, follow: Callable[[str], None]
) -> None:
    """Runs one of the programs beside this file, its output in a log in the scratch directory.

    Raises:
        StageError: it failed; the message has the end of its log.
    """
    name = f"genai-{program}"
    work.scratch.mkdir(parents=True, exist_ok=True)
    written = work.scratch / f"{name}.json"
    written.write_text(json.dumps(request, sort_keys=True), encoding="utf-8")
    log = work.scratch / f"{name}.log"
    # Unbuffered (-u): progress comes as it is made, and a traceback stays below what led to it.
    command = [
        sys.executable,
        "-u",
        "-m",
        f"prune_export.exporters.ort_genai.{program}",
        str(written),
    ]
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=_environment(work.machine.threads),
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                kept.write(line)
                follow(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        tail = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-3:]
        raise StageError(
            f"ort_genai: {program.strip('_')} (log: {log})",
            f"ended with {process.returncode}: " + " | ".join(line.strip()[:300] for line in tail),
            "use the exporter `onnx` for this model; memory is short where it ended with -9",
        )


def _environment(threads: int) -> dict[str, str]:
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
