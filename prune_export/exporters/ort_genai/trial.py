"""Compares a built engine with PyTorch, as a program, so that its memory is freed at the end.

    python -m prune_export.exporters.ort_genai.trial REQUEST.json

The request holds `source`, `out`, `threads`, `answer`, the file that gets the findings as JSON, and
`packed`: whether the engine multiplies packed weights with our kernel, whose calls are counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from prune_export.checkpoint.loading import load_config, load_model, load_tokenizer
from prune_export.exporters.ort_genai.runner import OgRunner, open_runner
from prune_export.exporters.ort_genai.tokens import compared
from prune_export.kernels import LIBRARY, Library
from prune_export.machine import Machine
from prune_export.numeric.logits import largest_error, mean_kl

_TEXT: Final = (
    "The lighthouse stood at the end of a long pier, and every evening the keeper climbed its "
    "stairs to light the lamp. Ships passed far out, on their way to harbours that he had only "
    "read about. In winter the waves broke over the stones and froze on the railing."
)
_POSITIONS: Final = 48
_STEPS: Final = 8
"""Tokens that are fed, or generated, one by one; the rest of the text goes in at once."""


def main(request: dict[str, Any]) -> None:
    """Measures how far the engine's logits and tokens are from PyTorch's, and writes it as JSON."""
    import torch

    machine = Machine(device="cpu", ram_bytes=0, gpu_bytes=0, threads=int(request["threads"]))
    torch.set_num_threads(machine.threads)
    out, source = Path(request["out"]), Path(request["source"])
    ids = _ids(source)
    library = out / LIBRARY if request["packed"] else None
    with open_runner(out, machine, library=library) as runner:
        got = [runner.step(ids[:, :-_STEPS])[0]]
        got += [
            runner.step(ids[:, i : i + 1])[0] for i in range(ids.shape[1] - _STEPS, len(ids[0]))
        ]
        calls = Library(library).calls if library else 0
    engine = np.concatenate(got, axis=1)[0]  # [positions, vocab]
    places = np.arange(ids.shape[1])
    if got[0].shape[1] == 1:
        places = places[-_STEPS - 1 :]
    prompt = ids[:, :-_STEPS]
    with OgRunner(out, machine, capacity=ids.shape[1]) as generator:
        tokens = generator.generate(prompt, _STEPS)
    logits = _pytorch(source)
    findings = _compare(logits(ids)[places], engine)
    findings |= _judged(logits, prompt[0].tolist(), tokens)
    findings["calls"] = calls // (1 + _STEPS)
    findings["tokenizer"] = compared(source, out)
    Path(request["answer"]).write_text(json.dumps(findings, sort_keys=True), encoding="utf-8")


def _ids(source: Path) -> np.ndarray:
    config = load_config(source)
    tokens = load_tokenizer(source)(_TEXT)["input_ids"]
    if max(tokens) >= config.vocab_size or len(tokens) < 2 * _STEPS:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, _POSITIONS).tolist()
    length = min(_POSITIONS, int(getattr(config, "max_position_embeddings", _POSITIONS)))
    return np.asarray([tokens[:length]], np.int64)


def _pytorch(source: Path) -> Callable[[np.ndarray], np.ndarray]:
    import torch

    model = load_model(source, dtype=torch.float32).eval()

    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(torch.from_numpy(ids)).logits[0].float().numpy()
        return found

    return logits


def _compare(wanted: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """Compares logits `[positions, vocab]`: errors, and KL of the engine from PyTorch in nats."""
    return {
        "finite": bool(np.isfinite(got).all()),
        "positions": len(got),
        "max_error": largest_error(wanted, got),
        "spread": float(wanted.std()),
        "mean_kl": mean_kl(wanted, got),
        "same_choice": int((wanted.argmax(-1) == got.argmax(-1)).sum()),
    }


def _judged(
    logits: Callable[[np.ndarray], np.ndarray], prompt: list[int], tokens: list[int]
) -> dict[str, Any]:
    """The largest gap, in PyTorch's logits, between a generated token and the best choice."""
    wanted = logits(np.asarray([prompt + tokens], np.int64))[len(prompt) - 1 : -1]
    chosen = wanted[np.arange(len(tokens)), tokens]
    return {"generated": len(tokens), "worst_choice": float((wanted.max(-1) - chosen).max())}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
