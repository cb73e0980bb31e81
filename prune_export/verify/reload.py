"""Checks that stock transformers loads a checkpoint in a fresh process.

No code of the checkpoint's is run, unless it is, byte for byte, a file of `prune_export.modeling`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prune_export.arch.table import tables
from prune_export.checkpoint.config import read_config
from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.modeling import FOLDER
from prune_export.progress import Progress, Silent
from prune_export.system.files import CARD_BYTES, read_regular
from prune_export.system.platforms import inherited
from prune_export.system.temporary import Temporary
from prune_export.verify import reload_child
from prune_export.verify.results import Reload

_TIMEOUT_SECONDS = 3600
_KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")


def measure_reload(
    checkpoint: Path, machine: Machine, *, progress: Progress | None = None
) -> Reload:
    """Loads `checkpoint` with AutoModelForCausalLM.from_pretrained, and reports what it says.

    The process runs isolated (`python -I`, a bare environment, no network), so neither this package
    nor a variable of the user's can help. `ok` means that no key was missing, unexpected or of
    another shape, and that generation with the cache gives the logits of generation without it.
    A model larger than the memory is loaded with its weights left on disk.

    Raises:
        VerifyError: transformers refuses the directory, or the cache does not work.
    """
    progress = progress or Silent()
    start = time.monotonic()
    with progress.task(f"reload of {checkpoint.name}", 1) as task:
        found = _run(checkpoint, machine)
        task.advance()
    if not found["whole"]:
        progress.say(f"{checkpoint.name} is larger than the memory: reloaded from disk in parts")
    if found["foreign"]:
        raise VerifyError(
            f"reload of {checkpoint}",
            f"the isolated process imported {', '.join(found['foreign'])}",
            "a .pth file of this environment imports prune_export: remove it",
        )
    if found["cache_differs_at"] is not None:
        raise VerifyError(
            f"reload of {checkpoint}",
            f"token {found['cache_differs_at']} has other logits with the KV cache than without",
            "the blocks' numbering in config.json or in the weights' names is wrong",
        )
    # A tensor of another shape is a missing one under a name that exists.
    missing = sorted({*found["missing"], *found["mismatched"]})
    return Reload(
        ok=not missing and not found["unexpected"],
        model_type=found["model_type"],
        missing=missing,
        unexpected=found["unexpected"],
        parameters=found["parameters"],
        seconds=time.monotonic() - start,
        own_code=_brings_our_code(checkpoint),
    )


def _brings_our_code(checkpoint: Path) -> bool:
    """Whether the model type is one of ours, and all code beside it is our own, unchanged."""
    config = read_config(checkpoint)
    table = tables().get(config["model_type"])
    bundled = table.bundled if table else None
    if bundled is None:
        return False
    ours = {name: (FOLDER / name).read_bytes() for name in bundled.files}
    found = {file.name: read_regular(file, CARD_BYTES, "code") for file in checkpoint.glob("*.py")}
    return found == ours and config.get("auto_map") == bundled.auto_map()


def _run(checkpoint: Path, machine: Machine) -> dict[str, Any]:
    environment = {key: os.environ[key] for key in _KEPT_VARIABLES if key in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(machine.threads),
        "CUDA_VISIBLE_DEVICES": "",
    }
    script = Path(reload_child.__file__)
    code = ["own-code"] if _brings_our_code(checkpoint) else []
    asked = [str(checkpoint.resolve()), str(machine.ram_bytes), *code]
    temporary = Temporary()
    try:
        with temporary as folder:
            done = subprocess.run(
                [sys.executable, "-I", str(script), *asked],
                env=environment | {"TMPDIR": str(folder)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
                pass_fds=inherited(temporary.descriptor),  # a child that outlives us still holds it
            )
    except subprocess.TimeoutExpired:
        raise VerifyError(
            f"reload of {checkpoint}",
            f"stock transformers was not done with it after {_TIMEOUT_SECONDS} s",
            "verify on a machine with more memory, or one that is less busy",
        ) from None
    if done.returncode != 0:
        words = "".join(f"\n    {line}" for line in done.stderr.splitlines()[-12:])
        raise VerifyError(
            f"reload of {checkpoint}",
            f"stock transformers could not load it (exit code {done.returncode}){words}",
            "the last line above is transformers' own reason",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
