"""Compares an engine with PyTorch of the same checkpoint: logits and greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.numeric.logits import largest_error, mean_kl
from prune_export.progress import Progress, Silent
from prune_export.verify.engine import Engine
from prune_export.verify.results import Parity
from prune_export.verify.session import Session

CACHED_STEPS: Final = 16
"""Of each window's tokens, how many are fed one at a time through the cache."""
GREEDY_TOKENS: Final = 64
GREEDY_PROMPT: Final = 32
_WINDOWS: Final = 4
_WINDOW_LENGTH: Final = 96


@dataclass(frozen=True)
class Tolerance:
    """The allowed deviation of a precision: `logits` in standard deviations, `kl` in nats.

    None is reported without a bound.
    """

    logits: float | None
    kl: float | None


TOLERANCES: Final = {
    "fp32": Tolerance(1e-3, 1e-5),
    "fp16": Tolerance(1e-1, 1e-3),
    "bf16": Tolerance(5e-1, 1e-2),
    "int8": Tolerance(None, 5e-2),
    "int8 activations": Tolerance(None, 5e-1),
    "fp8": Tolerance(None, 5e-1),
    "int4": Tolerance(None, None),
}
"""Measured on SmolLM2-135M: fp32 7e-5 of a logit, int8 a KL of 5e-3, with int8 activations 0.13,
fp8 0.10, int4 0.19 to 0.53 nats. An engine that is wired wrongly is off by whole nats in any
precision; int4 would often fail too, so its loss is stated beside its speed and not judged here."""


def measure_parity(
    engine: Engine,
    reference: Engine,
    ids: np.ndarray,
    machine: Machine,
    *,
    name: str | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Measures how far `engine` is from `reference`, the same checkpoint in PyTorch.

    `ids` int64 `[windows, length]` are real tokens. Up to 4 windows of up to 96 tokens go through
    both as one batch, the last 16 tokens one by one through the cache; then PyTorch says 64 greedy
    tokens, and the engine is asked after each of its prefixes what comes next. A token that differs
    where PyTorch itself held both for equal, within twice the logit error, is a tie: it does not
    count as equal, and does not fail the engine. `precision` is the engine's own unless given.

    One process runs at a time, so the memory is that of one model.

    Raises:
        VerifyError: the windows are too short, or the engine returns NaN or another vocabulary.
    """
    positions = min(filter(None, (reference.positions, engine.longest)), default=None)
    windows = ids[:_WINDOWS, : min(_WINDOW_LENGTH, positions or _WINDOW_LENGTH)]
    if windows.shape[1] <= CACHED_STEPS or not len(windows):
        raise VerifyError(
            f"parity of {engine.exporter}",
            f"got windows {windows.shape}, expected more than {CACHED_STEPS} tokens in each",
            "give longer windows of text",
        )
    name = name or engine.exporter
    prompt = windows[0, : min(GREEDY_PROMPT, windows.shape[1], (positions or GREEDY_TOKENS) // 2)]
    new = GREEDY_TOKENS if positions is None else min(GREEDY_TOKENS, positions - len(prompt))
    precision = precision or _precision(engine)
    with (
        (progress or Silent()).task(f"parity of {name}", 2) as task,
        Session(reference, machine) as pytorch,
    ):
        expected = pytorch.cached_logits(windows, CACHED_STEPS)
        tokens, taught = pytorch.greedy(prompt, new)
        task.advance()
        # Its arrays are still read, but its memory need not be held while the other model runs.
        pytorch.release()
        followed = np.concatenate([prompt, tokens[:-1]])[None]
        with Session(engine, machine) as other:
            got = _alike(other.cached_logits(windows, CACHED_STEPS), expected, name)
            said = other.cached_logits(followed, new - 1)[0, -new:]
            task.advance()
            return judged(name, precision, expected, got, taught, said)


def _alike(got: np.ndarray, expected: np.ndarray, name: str) -> np.ndarray:
    if got.shape[-1] != expected.shape[-1] or got.shape[0] != expected.shape[0]:
        raise VerifyError(
            f"parity of {name}",
            f"got logits {got.shape}, expected {expected.shape} as in PyTorch",
            "the engine was not made from this checkpoint: export it again",
        )
    return got


def judged(
    name: str,
    precision: str,
    expected: np.ndarray,
    got: np.ndarray,
    taught: np.ndarray,
    said: np.ndarray,
) -> Parity:
    """Makes the result; `expected`, `got` `[windows, positions, vocab]`, others `[new, vocab]`.

    `got` may lack the first positions, which an engine with only the last position's logits does
    not return.
    """
    tolerance = TOLERANCES[precision]
    expected = expected[:, -got.shape[1] :]
    error, kl = deviation(expected, got)
    scale = float(np.mean([row.std() for window in expected for row in window]))
    allowed = tolerance.logits * scale if tolerance.logits is not None else 0.0
    equal, ties = greedy_agreement(taught, said, tied_within=2 * error)
    close = error <= allowed if tolerance.logits is not None else True
    likely = kl <= tolerance.kl if tolerance.kl is not None else True
    exact = tolerance.logits is None or equal + ties == len(taught)
    return Parity(
        engine=name,
        against="pytorch",
        max_logit_error=error,
        mean_kl=kl,
        greedy_equal=equal,
        greedy_total=len(taught),
        ok=close and likely and exact,
        tolerance=allowed,
    )


def deviation(expected: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Computes the largest absolute logit error, and the mean KL(expected ‖ got) in nats.

    Both `[windows, positions, vocab]`; a window at a time is in memory.

    Raises:
        VerifyError: `got` holds NaN or infinity.
    """
    errors, divergences = [], []
    for wanted_window, got_window in zip(expected, got, strict=True):
        if not np.isfinite(got_window).all():
            raise VerifyError(
                "parity",
                "the engine returned logits that are not finite",
                "export in fp32, or bf16 where fp16 overflows",
            )
        errors.append(largest_error(wanted_window, got_window))
        divergences.append(mean_kl(wanted_window, got_window))
    return max(errors), float(np.mean(divergences))


def greedy_agreement(
    taught: np.ndarray, said: np.ndarray, *, tied_within: float
) -> tuple[int, int]:
    """Counts the greedy tokens that are equal, and those that differ only by a tie.

    Both `[new, vocab]`. A tie: in `taught`, the token that `said` prefers is at most `tied_within`
    below the largest.
    """
    rows = np.arange(len(taught))
    wanted, got = taught.argmax(axis=-1), said.argmax(axis=-1)
    gap = taught[rows, wanted] - taught[rows, got]
    differs = wanted != got
    return int((~differs).sum()), int((differs & (gap <= tied_within)).sum())


def _precision(engine: Engine) -> str:
    precision = str(engine.parameters.get("precision", "fp32"))
    if precision not in TOLERANCES:
        raise VerifyError(
            f"parity of {engine.exporter}",
            f"got precision {precision!r}, expected one of {', '.join(TOLERANCES)}",
            "pass the precision whose tolerance is to be used",
        )
    return "int8 activations" if precision == "int8" and engine.calibrated else precision
