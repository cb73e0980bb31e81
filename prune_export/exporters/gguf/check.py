"""Lets llama.cpp generate from a file, and compares its log probabilities with PyTorch's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.checkpoint.loading import load_model, load_tokenizer
from prune_export.errors import StageError
from prune_export.machine import Machine

NEW: Final = 16
_MOST: Final = {"f32": 0.02, "f16": 0.2, "q8_0": 1.0}
"""How far a token's log probability may be off in nats: far more than rounding makes of it, far
less than a wrong order of rows does."""


def compare(checkpoint: Path, file: Path, kind: str, machine: Machine) -> str:
    """What llama.cpp says to a prompt, greedily, scored by PyTorch: a sentence for the record.

    Raises:
        StageError: it does not load the file, or its log probabilities are another model's.
    """
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, dtype=torch.float32).eval()
    size = int(model.config.get_text_config().vocab_size)
    ids = [one % size for one in range(40, 52)]
    # llama.cpp's server tells nothing of tokens that are no whole character.
    told = [one for one in range(min(size, len(tokenizer))) if _plain(tokenizer.decode([one]))]
    without = sorted({*range(size)} - {*told})
    if not told:
        return "not checked by llama.cpp: no token is a text of its own"
    theirs = _generated(file, ids, without, machine.threads)
    tokens = [int(one["id"]) for one in theirs]
    with torch.no_grad():
        scores = model(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
    places = range(len(ids) - 1, len(ids) - 1 + len(tokens))
    off = max(
        abs(scores[place, token].item() - float(one["logprob"]))
        for place, token, one in zip(places, tokens, theirs, strict=True)
    )
    allowed = scores.clone()
    allowed[:, without] = -torch.inf
    same = sum(
        int(allowed[place].argmax()) == token for place, token in zip(places, tokens, strict=True)
    )
    if not off <= _MOST[kind]:
        raise StageError(
            str(file),
            f"llama.cpp's log probabilities are up to {off:.3g} from PyTorch's, "
            f"expected at most {_MOST[kind]}",
            "this is a fault of the export: report it with the model's config",
        )
    return (
        f"llama.cpp generates PyTorch's likeliest token {same} of {len(tokens)} times; "
        f"log probabilities at most {off:.2g} nats apart"
    )


def _plain(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable()


def _generated(file: Path, ids: list[int], without: list[int], threads: int) -> list[Any]:
    """Runs llama.cpp in a process of its own, which it ends on some faults."""
    asked = {"file": str(file), "ids": ids, "without": without, "new": NEW, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prune_export.exporters.gguf.llama_child"],
        input=json.dumps(asked), capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode != 0 or not lines:
        words = "".join(f"\n    {line}" for line in done.stderr.splitlines()[-10:])
        raise StageError(
            str(file), f"llama.cpp ended with exit code {done.returncode}{words}",
            "uninstall xllamacpp to export without this check",
        )  # fmt: skip
    found: list[Any] = json.loads(lines[-1])
    return found
