"""Searches: who drops out, that workers change nothing, and what is shown of it."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, StageError
from prune_export.execution import Options, executor, plan, run
from prune_export.execution.context import RunContext
from prune_export.execution.executor import Job
from prune_export.execution.inputs import Base
from prune_export.execution.search import Row, _going_on, rows_of
from prune_export.execution.sizing import exporter_of, shaped_model
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe, Search, Template
from prune_export.recipe.search import Candidate, Target, outside_of_blocks
from prune_export.report import style
from prune_export.report.candidates import CandidateReading, SearchReading
from prune_export.report.pareto import frontier, pareto
from prune_export.store import Store
from tests import measured_here
from tests.arch.tiny_models import random_model
from tests.execution.test_run import SEARCH, STABLE, hashes

pytestmark = pytest.mark.usefixtures("measured_here")

GRID = """\
      grid:
        depth: {method: deepest}
        width: {method: minitron, multiple_of: 8}
        remove: [0, 1, 2]
        ffn: [0, 0.5]
"""


SHORT = SEARCH[: SEARCH.index("  - heal: {method: lora, rank: 2, steps: 3")] + (
    "verify: {generation: false}\n"
)
"""The search alone."""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def row(label: str, perplexity: float) -> Row:
    candidate = Candidate((), None, 0.0, label)  # type: ignore[arg-type]
    return Row(candidate, pruned=2 * perplexity, rungs=[perplexity])


def test_the_better_half_goes_on_and_what_is_too_close_to_tell() -> None:
    search = Search(Target(parameters=0.5), "ranking", close=0.02)
    rows = [row("a", 20.0), row("b", 12.0), row("c", 10.0), row("d", 10.1), row("e", 10.15)]
    going = _going_on(search, rows)
    assert [one.candidate.label for one in going] == ["c", "d", "e"]
    assert rows[0].note == "given up: 0.69 nats behind after part of the healing"
    assert not rows[4].note
    assert len(_going_on(replace(search, close=math.log(1.3)), rows)) == 4


def test_who_was_healed_longer_ranks_before_who_was_given_up() -> None:
    early, late = row("early", 9.0), row("late", 10.0)
    late.rungs.append(9.5)
    assert sorted([early, late], key=lambda one: one.rank) == [late, early]


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    def one(speedup: float, healed: float) -> CandidateReading:
        return CandidateReading(f"{speedup}", speedup=speedup, pruned=99.0, healed=healed)

    slow, beaten, fast = one(1.1, 10.0), one(1.1, 12.0), one(1.5, 20.0)
    assert frontier([beaten, fast, slow]) == [slow, fast]
    assert frontier([one(1.2, 10.0), beaten]) == [one(1.2, 10.0)]


def searched(text: str, model: Path, corpus: Path, options: Options) -> tuple[dict[str, Any], Path]:
    result = run(Recipe.parse(text, root=corpus), str(model), options)
    (table,) = json.loads((result.out / "report.json").read_text())["searches"]
    return table, result.out


@pytest.fixture(scope="module")
def alone(
    tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """What the search finds without workers, and its result."""
    folder = tmp_path_factory.mktemp("alone")
    machine = Machine.detect(device="cpu", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        measured_here.install(patch)
        return searched(
            SHORT, tiny_llama, corpus, Options(folder / "out", folder / "store", machine)
        )


@pytest.mark.slow
def test_workers_change_nothing(
    tiny_llama: Path, corpus: Path, options: Options, alone: tuple[dict[str, Any], Path]
) -> None:
    one, out = alone
    several = SHORT.replace("validation:", "workers: 2\n      validation:")
    two, again = searched(several, tiny_llama, corpus, options)
    assert two == one
    stable = [pattern for pattern in STABLE if pattern != "prune_recipe*"]
    assert hashes(again, *stable) == hashes(out, *stable)


@pytest.mark.slow
@pytest.mark.all_pairs
def test_ray_changes_nothing(
    tiny_llama: Path,
    corpus: Path,
    options: Options,
    alone: tuple[dict[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What happens on Ray's workers is in test_executor.py, that workers change nothing above."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine starves them
    one, _ = alone
    on_ray = SHORT.replace("validation:", "executor: ray\n      workers: 2\n      validation:")
    two, _ = searched(on_ray, tiny_llama, corpus, options)
    assert two == one


@pytest.mark.slow
def test_an_error_in_a_worker_is_told(tiny_llama: Path, corpus: Path, options: Options) -> None:
    assert SHORT.count("learning_rate: 1.0e-3") == 1
    broken = SHORT.replace("learning_rate: 1.0e-3", "learning_rate: 1.0e+30")
    several = broken.replace("validation:", "workers: 2\n      validation:")
    with pytest.raises(StageError, match=r"the loss became nan.*\n.*lower `learning_rate`"):
        searched(several, tiny_llama, corpus, options)


class Deadly:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (9,)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told(options: Options) -> None:
    search = Search(Target(parameters=0.5), "ranking", workers=2)
    context = RunContext(
        Store(options.store), options.machine, Silent(), command="prune-export run it"
    )
    stages: Any = (Deadly(),)
    jobs = [Job("a", stages, options.store, "id", {}, "ranking")]
    with (
        pytest.raises(StageError, match="was killed") as told,
        executor.open_executor(search, context) as each,
    ):
        list(each(jobs, "pruning"))
    assert "prune-export run it" in str(told.value)


def test_a_target_that_nothing_reaches_is_refused_with_how_near_each_comes(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    far = SHORT.replace("parameters: 0.7, tolerance: 0.2", "parameters: 0.9, tolerance: 0.001")
    with pytest.raises(PlanError, match="no candidate reaches") as refused:
        plan(Recipe.parse(far, root=corpus), str(tiny_llama), options)
    named = re.findall(r"(\w+) \(comes only within [+-][\d.]+% of the target\)", str(refused.value))
    assert named == ["angular_distance", "deepest", "perplexity"]


def test_the_plan_shows_the_shapes_of_a_candidate_that_reaches_the_target(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    first = "        - prune: {method: block_influence, unit: mlp, sparsity: to_target}\n"
    text = SHORT.replace("      candidates:\n", "      candidates:\n" + first)
    planned = plan(Recipe.parse(text, root=corpus), str(tiny_llama), options).stages[0]
    assert planned.name == "the best of 2 candidates"
    assert planned.after.layers == 4


def test_an_embedding_too_large_to_reach_a_target_is_named(tmp_path: Path) -> None:
    def told(vocab: int) -> str:
        random_model("llama", {"vocab_size": vocab}, tmp_path / str(vocab))
        return outside_of_blocks(Checkpoint.open(tmp_path / str(vocab)).arch())

    assert re.search(r"9\d% of the parameters are outside of the blocks", told(50_000))
    assert not told(32)


@pytest.mark.slow
def test_a_grid_keeps_what_is_near_the_target(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    start, end = SHORT.index("      candidates"), SHORT.index("      validation")
    text = SHORT[:start] + GRID + SHORT[end : SHORT.index("      heal")]
    text += "verify: {generation: false, parity: false}\n"
    table, out = searched(text, tiny_llama, corpus, options)
    assert table["outside"] > 0
    assert len(table["candidates"]) > 1
    assert all(abs(one["parameters_left"] / 0.7 - 1) <= 0.2 for one in table["candidates"])
    assert "more combinations of the grid" in (out / "report.html").read_text()


def test_quality_over_speed_is_drawn_where_two_were_timed(tmp_path: Path) -> None:
    timed = [
        {"label": f"way {n}", "speedup": 1 + n / 10, "pruned": 30.0 + n, "parameters": 1}
        for n in range(3)
    ]
    found = TypeAdapter(SearchReading).validate_python(
        {"target": {"parameters": 0.7}, "candidates": [*timed, {"label": "untimed", "pruned": 9.0}]}
    )
    assert [one.label for one in found.timed] == ["way 0", "way 1", "way 2"]
    with style.styled():
        figure = style.new_figure(7.2, 3.9)
        pareto(figure.add_subplot(), found)
        style.save(figure, tmp_path / "pareto.png")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [text.split("  ")[0] for text in texts[:3]] == ["way 0", "way 1", "way 2"]


def test_amounts_that_round_to_the_same_shapes_compete_once() -> None:
    item = ("deepest", {"remove": 1}, "calibration")
    assert Template((item,), of_grid=True).fixed
    assert not Template((("deepest", {"sparsity": "to_target"}, "c"),)).fixed


def test_candidates_of_one_label_that_differ_in_another_key_all_compete(
    tiny_llama: Path, options: Options
) -> None:
    item: dict[str, Any] = {"method": "minitron", "ffn": "to_target", "multiple_of": 1}
    bodies = [item, {**item, "compensate": False}, item]
    search = Search(
        Target(parameters=0.9), "ranking", candidates=tuple(({"prune": body},) for body in bodies)
    )
    base, opened = Base("tiny", None, tiny_llama, "tiny"), Checkpoint.open(tiny_llama)
    context = RunContext(Store(options.store), options.machine, Silent())
    rows, _, _ = rows_of(context, search, base, opened.arch(), 0.9, exporter=exporter_of(search))
    assert [one.candidate.stages[0].entry.compensate for one in rows] == ["auto", False]


def test_a_model_of_other_shapes_has_blocks_of_the_kinds_that_are_left(
    tmp_path: Path, options: Options
) -> None:
    arch = random_model("qwen3_moe", {}, tmp_path / "m").arch
    context = RunContext(Store(options.store), options.machine, Silent())
    base = Base("m", None, tmp_path / "m", "m")
    for dropped, axis, size in (((2, 3, 4), "mlp", 8), ((0, 3), "kv", 1), ((0, 2), "expert", 2)):
        after = arch.without(dropped)
        after = after.with_sizes({one: size for one in after.sizes if one.startswith(f"{axis}.")})
        shaped = Checkpoint.open(shaped_model(context, base, arch, after).path)
        assert {name: entry.shape for name, entry in shaped.entries.items()} == {
            tensor.name: after.shape(tensor) for tensor in after.stored()
        }
