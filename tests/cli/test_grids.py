"""Tables at any width: nothing is cut off, and no column is a word wide."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.cells import cell_len

from prune_export.cli.grids import print_pairs, print_table
from prune_export.cli.screen import Screen
from prune_export.report import COLUMNS

LONG = "gemma-3-270m-it-with-a-very-long-name-of-its-own"
PLAN = [
    (f"search: the best of 12 candidates ({LONG})", "18 → 17", "262.5M", "1001.45 MiB", "3.29 GiB",
     "1001.45 MiB", "4 min 24 s"),
    ("report: report and card", "17", "262.5M", "1001.45 MiB", "700.00 MiB", "1.01 GiB", "7.7 s"),
]  # fmt: skip
SUMMARY = [
    ("parameters", "134.5M", "113.3M", "−15.8 %"),
    ("prefill, ort_genai (batch 8, prompt 1024, new 128)", "794.5 tok/s", "982.0 tok/s",
     "1.24× faster (1.20–1.25)"),
    ("sparse weights, tensorrt_rtx", "", "of 211 weights 120 hold 2 of 4, 91 none (13% zeros)",
     "120 layers eligible but not picked: dense kernels were faster"),
]  # fmt: skip
TABLES = [
    pytest.param(["step", "blocks", "parameters", "weights", "peak RAM", "disk", "about"], PLAN),
    pytest.param(COLUMNS, SUMMARY),
    pytest.param(["artifact", "size", "changed", "complete"],
                 [(f"prune-angular_distance-{'0' * 24}", "432.11 MiB", "2026-11-25 10:11", "yes")]),
    pytest.param(["engine", "with PyTorch", "largest logit error", "mean KL", "greedy tokens"],
                 [("ort_genai", "agrees", "1.23e-05", "1.2e-09", "96 of 96")]),
    pytest.param(["recipe", "what it does"], [(LONG, "Drop 25 % of the blocks. " * 6)]),
    pytest.param(["key", "type", "default", "meaning"],
                 [("gradient_checkpointing", "`cosine` or `linear`", "auto", "It falls. " * 9)]),
    pytest.param(["place", "what"], [(f"/srv/{LONG}/{LONG}/{LONG}", "a path without a blank")]),
]  # fmt: skip


def printed(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    screen = Screen(width=width)
    screen.file = io.StringIO()
    print_table(screen, f"{LONG} on {LONG}", columns, rows)
    return str(screen.file.getvalue()).splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("columns", "rows"), TABLES)
def test_tables_fit_and_say_everything(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> None:
    lines = printed(columns, rows, width)
    assert max(map(cell_len, lines)) <= width
    said = "".join("".join(lines).replace("│", " ").split())
    for row in rows:
        for cell in row:
            words = cell.split()
            assert all(word in said for word in words if len(word) < 20), (cell, lines)
    # Nowhere is a text of several words written one word a line.
    assert len(lines) <= 3 + sum(
        2 + sum(2 + len(cell) // 18 for cell in row if cell) for row in rows
    )


def test_a_table_that_fits_is_left_alone() -> None:
    lines = printed(["a", "b"], [("one", "2")], 80)
    assert [line.split() for line in lines[-3:]] == [
        ["a", "┃", "b"],
        ["━━━━╇━━"],
        ["one", "│", "2"],
    ]


def test_one_that_does_not_is_written_row_by_row() -> None:
    lines = printed(["step", "blocks", "disk"], [("prune " * 5, "1 " * 30, "2 " * 30)], 40)
    assert "prune prune prune prune prune" in [line.strip() for line in lines]
    assert any(line.startswith("  blocks: 1 1") for line in lines)
    assert any(line.startswith("  disk: 2 2") for line in lines)


@pytest.mark.parametrize("width", [60, 120])
def test_places_and_what_is_there(width: int) -> None:
    screen = Screen(width=width)
    screen.file = io.StringIO()
    print_pairs(screen, [("out/", "the checkpoint: AutoModelForCausalLM loads it"), (LONG, "it")])
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == (2 if width == 120 else 4)
    assert max(map(len, lines)) <= width
