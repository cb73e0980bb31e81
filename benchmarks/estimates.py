"""Planned over actual time, memory and disk of each step of runs, as a table and a figure.

    python benchmarks/recipes.py --data .demo --work DIR      # runs every bundled recipe
    python benchmarks/estimates.py DIR [--figure estimates.png] [--save]

DIR is that directory, or any directories of results, or their report.json. What was taken from a
store is left out: it took no time. A run that others share the machine with shows their load; then
run `recipes.py --threads 1` and compare with processor seconds (`--processor`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _result import save

from prune_export.units import text_from_bytes, text_from_seconds

QUANTITIES = ("seconds", "ram_bytes", "disk_bytes")
WITHIN = {"seconds": 1.5, "ram_bytes": 1.25, "disk_bytes": 1.25}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("places", type=Path, nargs="+", help="results, or what recipes.py made")
    asked.add_argument("--figure", type=Path, help="where to draw it")
    asked.add_argument("--save", action="store_true", help="keep all rows in benchmarks/results")
    asked.add_argument("--processor", action="store_true", help="compare with processor seconds")
    given = asked.parse_args()
    rows = list(rows_of(given.places))
    if given.processor:
        rows = [row | {"seconds": row["processor_seconds"]} for row in rows]
    if not rows:
        raise SystemExit("no report with estimates there: run a recipe with this version")
    print("\n".join(table(rows)))
    if given.figure:
        draw(rows, given.figure)
        print(given.figure)
    if given.save:
        seconds = "processor" if given.processor else "wall"
        print(save("estimates", {"seconds": seconds, "rows": rows}))


def rows_of(places: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The steps of every report at or below some places that did any work, sums last."""
    for place in places:
        files = [place] if place.is_file() else sorted(place.rglob("report.json"))
        for file in files:
            report = json.loads(file.read_text(encoding="utf-8"))
            done = [one for one in report.get("estimates", []) if not one["reused"]]
            name = report["recipe"]["name"]
            known = [one for one in done if one["planned_seconds"] is not None]
            yield from ({"recipe": name, **one} for one in known)
            if known:
                yield {"recipe": name, "step": "all", "reused": 0, **_sums(known)}


def _sums(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Times and disk add up; of memory the peaks are compared."""
    found: dict[str, Any] = {"processor_seconds": sum(one["processor_seconds"] for one in steps)}
    for quantity in QUANTITIES:
        join = max if quantity == "ram_bytes" else sum
        for key in (quantity, f"planned_{quantity}"):
            found[key] = join([one[key] or 0 for one in steps])
    return found


def over(row: dict[str, Any], quantity: str) -> float | None:
    """Planned over actual; None where either is nothing."""
    planned, actual = row[f"planned_{quantity}"], row[quantity]
    return planned / actual if planned and actual else None


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| recipe | step | time | planned ÷ actual | memory | planned ÷ actual | disk | ÷ |"
    yield "|:--|:--|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        cells = [row["recipe"], row["step"]]
        for quantity in QUANTITIES:
            text = text_from_seconds if quantity == "seconds" else text_from_bytes
            ratio = over(row, quantity)
            cells += [text(row[quantity]), "" if ratio is None else f"{ratio:.2f}"]
        yield f"| {' | '.join(cells)} |"
    for quantity in QUANTITIES:
        found = [r for row in rows if row["step"] == "all" and (r := over(row, quantity))]
        if found:
            bound = WITHIN[quantity]
            inside = sum(1 / bound <= one <= bound for one in found)
            yield (
                f"\n{quantity}: {inside} of {len(found)} recipes within a factor of {bound}; "
                f"median {median(found):.2f}, {min(found):.2f} to {max(found):.2f}"
            )


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draws planned over actual of each recipe as a whole and of its steps, on a log scale."""
    from prune_export.report import style

    names = list(dict.fromkeys(row["recipe"] for row in rows))
    with style.styled():
        figure = style.new_figure(7.2, 1.4 + 0.3 * len(names))
        axes = figure.subplots(1, 2, sharey=True)
        for at, (quantity, title) in enumerate((("seconds", "time"), ("ram_bytes", "peak memory"))):
            axis, bound = axes[at], WITHIN[quantity]
            axis.axvspan(1 / bound, bound, color=style.GRID, zorder=0)
            for row in rows:
                if (ratio := over(row, quantity)) is None:
                    continue
                whole = row["step"] == "all"
                axis.scatter(
                    [ratio], [names.index(row["recipe"])], s=40 if whole else 14, zorder=3,
                    color=style.HEALED if whole else style.DENSE,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.axvline(1.0, color=style.RULE, linewidth=1.0)
            style.title(axis, f"Planned ÷ actual {title}", f"grey: within {bound}; blue: the run")
        axes[0].set_yticks(range(len(names)), [style.label(name, 26) for name in names])
        axes[0].invert_yaxis()
        style.save(figure, file)


if __name__ == "__main__":
    main()
