"""Refits a linear layer after some of its inputs were removed, by ridge regression.

The output W X of a projection is predicted from its kept inputs S alone: the change D of the kept
columns minimizes |D X_S - W_R X_R|² + ridge |D|², where R are the removed inputs. A large ridge
changes nothing; a small one predicts the removed inputs from the kept. The ridge that is best on
held-out windows is taken, if it helps at all.

With targets t (`Products.see_with_target`: the outputs that would bring the residual stream back to
that of the dense model), D minimizes Σ w |(W + D)_S x_S - y|² + ridge |D|² instead, with one weight
w a token; y is between W x and t. So what earlier blocks have lost is made good as well. The
weights matter: a few tokens have states hundreds of times as large as the rest, and would dominate
the fit, while the norm that follows makes all tokens equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from prune_export.numeric.cholesky import solve_damped

RIDGES: Final = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0)
"""Tried, as fractions of the kept inputs' mean square; the best on held-out tokens is taken. On
SmolLM2-135M with 5,000 tokens it is 0.1 for heads and 1 to 3 for channels; the more tokens, the
less."""

SHARE: Final = 0.5
"""How far from the own output to the target it is fitted. On SmolLM2-135M at 60 % of its parameters
0.3 to 0.7 are within 5 % of each other in perplexity, and all of the way is worse (ADR 0018)."""

_ROWS_PER_INPUT: Final = 8
_LEAST_ROWS: Final = 4096
"""Tokens that products are summed over, at most: more hardly change a fit, and products of all
tokens would take most of the time of a block."""

_HELD_OUT: Final = 8
"""Every eighth window, or where there are few the last eighth of each, is not fitted."""

_HELD_OUT_ROWS: Final = 512
_SLICES: Final = 6


class Products:
    """Accumulates XᵀX of a linear layer's inputs (and of targets), and keeps some rows held out.

    `tokens` and `samples` are those that will come, `whole` says that a call brings windows (the
    tokens of an expert come as they are routed). Windows either all have targets or none has.
    """

    def __init__(self, width: int, device: str, *, tokens: int, samples: int, whole: bool) -> None:
        self.sums = torch.zeros(width, width, device=device)
        self.rows = 0
        self.crossed: torch.Tensor | None = None
        """`[out, in]`: sums of products of targets and inputs, where there are targets."""
        self._held: list[torch.Tensor] = []
        self._held_targets: list[torch.Tensor] = []
        self._windows = whole and samples >= 2 * _HELD_OUT
        self._seen = 0
        wanted = max(_LEAST_ROWS, _ROWS_PER_INPUT * width)
        self._every = max(1, -(-tokens // wanted)) if whole else 1
        self._held_every = max(1, tokens // _HELD_OUT // _HELD_OUT_ROWS)

    def see(self, states: torch.Tensor) -> None:
        """Adds inputs `[samples, length, in]`."""
        rows, held = self._parts(states)
        self._seen += len(states)
        self._held.append(held.clone())
        self.rows += len(rows)
        _add_products(self.sums, rows)

    def see_with_target(
        self, states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Adds inputs, target outputs `[samples, length, out]`, and the tokens' weights."""
        parts = [self._parts(of) for of in (states, wanted, weights.sqrt()[..., None])]
        (rows, targets, scales), (held, held_targets, held_scales) = zip(*parts, strict=True)
        self._seen += len(states)
        self._held.append(held * held_scales)
        self._held_targets.append(held_targets * held_scales)
        self.rows += len(rows)
        rows = rows * scales
        _add_products(self.sums, rows)
        if self.crossed is None:
            self.crossed = torch.zeros(wanted.shape[-1], len(self.sums), device=rows.device)
        self.crossed.addmm_((targets * scales).T, rows)

    def _parts(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits `[samples, length, …]` into rows to fit and rows held out."""
        if self._windows:
            at = torch.arange(self._seen, self._seen + len(states)) % _HELD_OUT
            out = (at == _HELD_OUT - 1).to(states.device)
            fitted, held = states[~out], states[out]
        else:
            last = states.shape[1] - states.shape[1] // _HELD_OUT
            fitted, held = states[:, :last], states[:, last:]
        rows = fitted.flatten(0, 1)[:: self._every].float()
        return rows, held.flatten(0, 1)[:: self._held_every].float()

    def held_out(self) -> torch.Tensor:
        """The held-out inputs `[rows, in]`."""
        return torch.cat(self._held)

    def held_targets(self) -> torch.Tensor | None:
        """The targets of the held-out inputs `[rows, out]`, if there are any."""
        return torch.cat(self._held_targets) if self._held_targets else None

    def matrix(self) -> torch.Tensor:
        """The sums XᵀX `[in, in]`, both triangles filled in."""
        return self.sums.tril() + self.sums.tril(-1).T


def _add_products(sums: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds XᵀX on and below the diagonal, in slices: 7/12 of the work of the whole."""
    width = len(sums)
    step = -(-width // _SLICES) if width >= 64 * _SLICES else width
    for start in range(0, width, step):
        stop = min(start + step, width)
        sums[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])


@dataclass(frozen=True)
class Refit:
    """A refitted projection.

    `weight` `[out, in]` has zeros in the removed columns. Errors are shares of the square of what
    was fitted to on held-out tokens (None where there are none): `cut` as it was cut, `error` as it
    is now. `ridge` is None where nothing was refitted.
    """

    weight: torch.Tensor
    error: float | None
    cut: float | None
    ridge: float | None


def refit(
    weight: torch.Tensor,
    kept: torch.Tensor,
    products: Products,
    *,
    always: bool = False,
    ridges: Sequence[float] = RIDGES,
) -> Refit:
    """Refits the kept columns of a projection `[out, in]`, if that is better on held-out rows.

    `kept` is bool `[in]`. With `always`, the best ridge is taken even if the plain cut is better.
    """
    weight = weight.float()
    plain = weight * kept
    held, targets = products.held_out(), products.held_targets()
    given = held @ weight.T
    if targets is not None:
        given += SHARE * (targets - given)
    whole = float(given.square().sum(dtype=torch.float64))
    if bool(kept.all()) or products.rows == 0 or len(held) == 0 or whole == 0.0:
        return Refit(plain, None, None, None)

    def error(change: torch.Tensor) -> float:
        off = held @ (change - lost).T if targets is None else held @ (plain + change).T - given
        return float(off.square().sum(dtype=torch.float64)) / whole

    lost = weight * ~kept
    cut = error(torch.zeros_like(weight))
    best: tuple[float, float | None, torch.Tensor] = (cut, None, plain)
    if always:
        best = (float("inf"), None, plain)
    sums = products.matrix()
    own = sums[kept][:, kept].double()
    wanted = (weight[:, ~kept] @ sums[~kept][:, kept]).double()
    if products.crossed is not None:
        further = products.crossed[:, kept].double() - weight.double() @ sums[:, kept].double()
        wanted += SHARE * further
    mean = float(own.diagonal().mean())
    for ridge in ridges:
        change = solve_damped(own, wanted, ridge * mean)
        if change is None:
            continue
        full = torch.zeros_like(weight)
        full[:, kept] = change.float()
        off = error(full)
        if off < best[0]:
            best = (off, ridge, plain + full)
    return Refit(best[2], best[0] if best[1] is not None else cut, cut, best[1])
