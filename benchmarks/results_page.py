"""Makes docs/results.md from the newest committed run of each benchmark; no number is typed.

    python benchmarks/results_page.py

A benchmark that has no run yet has no section.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
PAGE: Final = ROOT / "docs" / "results.md"

HEAD: Final = """# What the methods do to one small model

<!-- made by benchmarks/results_page.py from benchmarks/results; do not edit -->

All figures are of SmolLM2-135M on English Wikipedia text, each table from one committed run. A
model this small has little to spare: large models lose less at the same cut. Perplexities of
different tables are not to be compared, as their windows differ.
"""


def page(results: Path) -> str:
    """The whole page."""
    return "\n".join([HEAD, *_sections(results)])


def _sections(results: Path) -> Iterator[str]:
    for name, title, table in SECTIONS:
        file = newest(results, name)
        if file is None:
            continue
        run = json.loads(file.read_text(encoding="utf-8"))
        yield f"## {title}\n"
        yield from table(run)
        machine = run["machine"]
        yield (
            f"\n{machine['processor']}, {machine['cores']} cores; samples in "
            f"[{file.name}](../benchmarks/results/{file.name}).\n"
        )


def newest(results: Path, name: str) -> Path | None:
    """The newest run of a benchmark; file names begin with their dates."""
    found = sorted(
        file
        for file in results.glob("*.json")
        if json.loads(file.read_text(encoding="utf-8")).get("benchmark") == name
    )
    return found[-1] if found else None


def _depth(run: dict[str, Any]) -> Iterator[str]:
    samples, length = run["calibration"]
    yield (
        f"Perplexity without healing after so many of 30 blocks are gone; {samples} windows of "
        f"{length} calibration tokens for every method.\n"
    )
    methods = run["methods"]
    longest = max(methods.values(), key=lambda one: len(one["rows"]))
    counts = [len(row["dropped"]) for row in longest["rows"]]
    dense = next(iter(methods.values()))["dense"]
    yield from _header(["method", *(f"{count} gone" for count in counts)])
    yield _line(["dense", *[_perplexity(dense)] * len(counts)])
    for name, one in sorted(methods.items(), key=lambda item: _at(item[1], counts[-1])):
        by_count = {len(row["dropped"]): row["perplexity"] for row in one["rows"]}
        yield _line([f"`{name}`", *(_perplexity(by_count.get(count)) for count in counts)])


def _at(method: dict[str, Any], count: int) -> float:
    return next((r["perplexity"] for r in method["rows"] if len(r["dropped"]) == count), 1e99)


def _sparse(run: dict[str, Any]) -> Iterator[str]:
    calibration = run["tokens"]["calibration"]
    yield (
        f"Zeros in every linear weight of the blocks, no healing; {calibration['windows']} windows "
        f"of {calibration['length']} calibration tokens. Patterns are kept:of. Dense: "
        f"{_perplexity(run['dense']['perplexity'])}. Processor seconds are those of the pruning; "
        "one plain forward pass over the same tokens, at another time, is 1.\n"
    )
    columns = ["method", "order", "pattern", "perplexity", "against llm-compressor's"]
    yield from _header([*columns, "forwards", "CPU seconds of theirs", "GiB over imports"])
    for row in run["rows"]:
        if "shuffle" in row or "jitter" in row:
            continue
        who = "llm-compressor's " if row["who"] == "peer" else ""
        ratio, time = row.get("perplexity_over_peer"), row.get("time_over_peer")
        yield _line([
            f"{who}`{row['method']}`", row["order"], row["pattern"].replace("%", " %"),
            _perplexity(row["perplexity"]), "" if ratio is None else f"{ratio - 1:+.1%}",
            f"{row['forwards']:.2f}", "" if time is None else f"{time:.2f}×",
            f"{row['peak_over_imports_bytes'] / 2**30:.2f}",
        ])  # fmt: skip
    yield from _draws(run["rows"])
    for case, own in run.get("alternating", {}).items():
        method, pattern = case.split()
        yield (
            f"\n`{method}`, {pattern.replace('%', ' %')}, in one pass, in turns with a plain "
            f"forward pass in one process: {own['forwards']:.2f} of it."
        )


def _sparse_draws(run: dict[str, Any]) -> Iterator[str]:
    calibration, evaluation = (run["tokens"][name] for name in ("calibration", "evaluation"))
    yield (
        f"As many draws of {calibration['windows']} windows of {calibration['length']} calibration "
        f"tokens as are named; perplexity on the same {evaluation['windows']} windows for all. "
        f"Dense: {_perplexity(run['dense']['perplexity'])}. `block` is the order of the authors' "
        "codes, which a test compares it with.\n"
    )
    yield from _header(["method", "pattern", "whose", "order", "draws", "mean", "least", "most"])
    found: dict[tuple[str, ...], list[float]] = {}
    for row in run["rows"]:
        pruner = f"`{row['method']}`", row["pattern"].replace("%", " %"), row["who"], row["order"]
        found.setdefault(pruner, []).append(row["perplexity"])
    for pruner, own in found.items():
        figures = (sum(own) / len(own), min(own), max(own))
        yield _line([*pruner, str(len(own)), *(f"{one:.2f}" for one in figures)])


_DRAWS: Final = {
    "shuffle": "the calibration windows in {} orders, which changes nothing but rounding",
    "jitter": "the dense weights in {} draws, moved by about 1e-6 of themselves",
}


def _draws(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What does not change the problem, but its rounding, does to both."""
    for kind, words in _DRAWS.items():
        found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
        for row in rows:
            if kind in row or not _DRAWS.keys() & row.keys():
                pruner = row["who"], row["order"]
                case = found.setdefault((row["method"], row["pattern"]), {})
                case.setdefault(pruner, []).append(row["perplexity"])
        for (method, pattern), by in found.items():
            drawn = {pruner: sorted(own) for pruner, own in by.items() if len(own) > 1}
            if not drawn:
                continue
            count = max(map(len, drawn.values()))
            told = "; ".join(
                f"{'llm-compressor' if who == 'peer' else 'ours'}, order `{order}`, {_told(own)}"
                for (who, order), own in drawn.items()
            )
            yield (
                f"\n`{method}`, {pattern.replace('%', ' %')}, with {words.format(count)}: {told}."
            )


def _told(found: list[float]) -> str:
    return f"{found[0]:.2f} to {found[-1]:.2f}, mean {sum(found) / len(found):.2f}"


def _memory(run: dict[str, Any]) -> Iterator[str]:
    yield (
        f"`{run['method']}` at {run['pattern']} of {run['parameters'] / 1e9:.2f} billion random "
        f"weights ({run['checkpoint_bytes'] / 2**30:.1f} GiB), {run['samples']} windows of "
        f"{run['length']} tokens: at most {run['peak_over_imports_bytes'] / 2**30:.2f} GiB over "
        f"Python and torch, where the plan said {run['planned_bytes'] / 2**30:.2f}; "
        f"{run['processor_seconds']:.0f} processor seconds."
    )


def _recipes(run: dict[str, Any]) -> Iterator[str]:
    yield (
        "As `benchmarks/recipes.py` runs them: the demonstration's text, heals of few steps. "
        "Decode is against the dense engine of the same kind at "
        f"{run['workload']['prompt']} + {run['workload']['new']} tokens.\n"
    )
    yield from _header(["recipe", "parameters left", "dense", "pruned", "healed", "decode"])
    for row in run["rows"]:
        before, after = row["parameters"]
        found = row["perplexity"]
        speeds = [
            f"{one['engine']} {one['ratio']:.2f}× ({one['low']:.2f}–{one['high']:.2f})"
            for one in row["speed"]
            if one["phase"] == "decode"
        ]
        yield _line([
            f"`{row['recipe']}`", f"{after / before:.1%}",
            *(_perplexity(found.get(name)) for name in ("dense", "pruned", "healed")),
            ", ".join(speeds),
        ])  # fmt: skip


def _structured(run: dict[str, Any]) -> Iterator[str]:
    steps = run["heal_steps"]
    yield (
        "Each method brought to the same number of parameters"
        + (f", then healed for {steps} steps, all alike" if steps else ", before healing")
        + f"; {run['calibration']['samples']} windows of {run['calibration']['length']} "
        "calibration tokens.\n"
    )
    columns = ["method", "parameters left", "pruned"]
    columns += ["healed"] if steps else []
    columns += ["decode, ONNX fp32"] if any("speedup" in row for row in run["rows"]) else []
    yield from _header(columns)

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        return -row.get("target", 2.0), row.get("healed", row.get("pruned", 1e99))

    for row in sorted(run["rows"], key=rank):
        if "refused" in row:
            yield _line([f"`{row['method']}`", f"{row['target']:.0%}: refused", *[""] * 3][
                : len(columns)
            ])  # fmt: skip
            continue
        cells = [f"`{row['method']}`", f"{row.get('parameters_left', 1.0):.1%}"]
        cells += [_perplexity(row["pruned"])]
        cells += [_perplexity(row.get("healed"))] if "healed" in columns else []
        cells += [f"{row['speedup']:.2f}×" if "speedup" in row else ""]
        yield _line(cells[: len(columns)])


def _ziplm(run: dict[str, Any]) -> Iterator[str]:
    ratio, low, high = run["decode"]
    before, after = run["parameters"]
    yield (
        f"Asked for {run['asked']}×, the assembled engine decodes {ratio:.2f}× ({low:.2f}–"
        f"{high:.2f}) as fast as the dense one; {after / before:.1%} of the parameters are left. "
        "Perplexity without healing: "
        + ", ".join(f"{name} {_perplexity(value)}" for name, value in run["perplexity"].items())
        + "."
    )


Table = Callable[[dict[str, Any]], Iterator[str]]
SECTIONS: Final[tuple[tuple[str, str, Table], ...]] = (
    ("depth-methods", "Blocks removed", _depth),
    ("structured", "Depth and width at one size", _structured),
    ("sparse-quality", "Zeros", _sparse),
    ("sparse-draws-gblm", "GBLM over draws of the calibration windows", _sparse_draws),
    ("sparse-draws-sparsegpt", "SparseGPT over draws of the calibration windows", _sparse_draws),
    ("sparse-memory-wanda", "Memory of Wanda", _memory),
    ("sparse-memory-sparsegpt", "Memory of SparseGPT", _memory),
    ("sparse-memory-gblm", "Memory of GBLM", _memory),
    ("recipes", "Recipes, end to end", _recipes),
    ("ziplm", "A speed asked for and measured", _ziplm),
)


def _header(cells: list[str]) -> Iterator[str]:
    yield _line(cells)
    yield _line([":--", *["--:"] * (len(cells) - 1)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _perplexity(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS), encoding="utf-8")
    print(PAGE)
