"""--time: a recipe is made smaller until its plan fits, and the plan says how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from prune_export.cli.options import seconds
from prune_export.contracts import Cost
from prune_export.errors import PlanError
from prune_export.execution.watch import Watch
from prune_export.machine import Machine
from prune_export.planning import Plan, PlannedStage, Size, fit_time, how_busy
from prune_export.planning.fitting import scaled
from prune_export.recipe import Recipe

RECIPE = """
recipe: 1
data:
  calibration: {files: [a.txt], samples: 128, length: 1024}
  ranking: {files: [a.txt], samples: 64, length: 1024}
  healing: {files: [a.txt], samples: 32000, length: 1024}
stages:
  - search:
      target: {parameters: 0.75}
      candidates:
        - prune: {method: structured_wanda, sparsity: to_target}
        - prune: {method: minitron, sparsity: to_target}
        - prune: {method: deepest, sparsity: to_target}
      engines: [onnx: {precision: fp32}, onnx: {precision: int8}]
      validation: ranking
      heal: {method: lora, rank: 2, steps: 120, batch: 16}
      measure_speed: true
  - heal: {method: lora, rank: 2, steps: 2000, batch: 16}
verify: {speed: {minutes: 3}}
"""
SIZE = Size(1, 1, 1)


def staged(kind: str, took: float, note: str = "", name: str = "x") -> PlannedStage:
    return PlannedStage(kind, name, {}, SIZE, SIZE, Cost(ram_bytes=1, disk_bytes=2), took, note)


def plan_of(recipe: Recipe) -> Plan:
    """A plan that takes a second for each 100 tokens that are trained on, and 60 besides."""
    search, heal = (stage.entry for stage in recipe.stages)
    length = recipe.data["healing"].length
    short = dict(search.heal)
    trial = len(search.candidates) * short["steps"] * short["batch"] * length / 100
    stages = (
        staged("search", trial),
        staged("heal", heal.steps * heal.batch * length / 100),
        staged("verify", 60.0),
    )
    return Plan("r", "m", "llama", stages, Machine.detect(device="cpu", threads=1), ())


class TestFitting:
    def test_what_fits_is_left_as_it_is(self) -> None:
        recipe = Recipe.parse(RECIPE)
        same, planned = fit_time(recipe, 1e9, plan_of)
        assert same is recipe
        assert planned.notes[-1].startswith("All of it fits into")

    @pytest.mark.parametrize("allowed", [600.0, 3600.0, 36000.0])
    def test_what_does_not_is_made_smaller_and_says_how(self, allowed: float) -> None:
        recipe = Recipe.parse(RECIPE)
        fitted, planned = fit_time(recipe, allowed, plan_of)
        assert 0.5 * allowed < planned.seconds <= 0.85 * allowed + 1
        assert "short heals 120 → " in planned.notes[-1]
        assert "it would be: " in planned.notes[-1]
        assert Recipe.parse(fitted.to_yaml()).to_dict() == fitted.to_dict()

    def test_what_never_fits_is_refused(self) -> None:
        with pytest.raises(PlanError, match="the least that this recipe can do takes about"):
            fit_time(Recipe.parse(RECIPE), 61.0, plan_of)

    def test_a_busy_machine_gets_less_to_do_and_is_not_refused(self) -> None:
        recipe = Recipe.parse(RECIPE)
        rested = fit_time(recipe, 36000.0, plan_of)[1]
        busy = fit_time(recipe, 36000.0, plan_of, busy=3.0)[1]
        assert busy.seconds <= 0.85 * 36000 / 3 + 1 < rested.seconds
        assert "busy: work takes 3.0 times as long" in busy.notes[-1]
        least = fit_time(recipe, 120.0, plan_of, busy=3.0)[1]  # what it takes here at rest
        assert least.seconds <= 120.0

    def test_how_busy_it_is_is_within_bounds(self) -> None:
        assert 1.0 <= how_busy(0.01) <= 4.0

    def test_levels_only_take_away(self) -> None:
        recipe = Recipe.parse(RECIPE)
        times = [plan_of(scaled(recipe, level)).seconds for level in range(13)]
        assert times == sorted(times, reverse=True)
        assert times[0] > 1000 * times[-1] - 60_000
        bundled = scaled(Recipe.load("smaller-25"), 12).stages[0].entry
        assert len(bundled.engines) == 4  # a model that ort_genai refuses is left with onnx int8
        least = scaled(recipe, 12)
        (stage, _) = least.stages
        assert len(stage.entry.candidates) == 1
        assert len(stage.entry.engines) == 2
        assert least.data["ranking"].samples == 16
        assert not least.stages[0].entry.measure_speed
        assert least.data["healing"].samples == 32000


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class TestWatch:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        clock = Clock()
        monkeypatch.setattr("prune_export.execution.watch.time.monotonic", clock)
        return clock

    def watch(self, budget: float | None = 1000.0) -> Watch:
        planned = [
            staged("search", 100.0),
            staged("heal", 200.0),
            staged("export", 10.0, "the dense model, to compare with"),
            staged("export", 10.0),
            staged("verify", 80.0),
        ]
        return Watch(planned, budget, began=0.0)

    def test_steps_are_told_beside_what_was_planned(self, clock: Clock) -> None:
        watch = self.watch()
        with watch.step("export", "x", dense=True):
            clock.now = 12.0
        (found,) = watch.steps
        assert (found["planned_seconds"], found["seconds"]) == (10.0, 12.0)
        assert (found["planned_disk_bytes"], found["disk_bytes"]) == (2, 0)
        assert found["ram_bytes"] > 0

    def test_a_heal_takes_the_steps_that_there_is_time_for(self, clock: Clock) -> None:
        watch = self.watch()
        with watch.step("search"):
            clock.now = 300.0  # three times as long as planned
        assert watch.ratio == pytest.approx(3.0)
        assert watch.after("heal") == pytest.approx(300.0)
        # 400 seconds are left for 200 x 3.
        assert watch.steps_for(60, 200.0, "heal") == 40
        assert replace_budget(watch, 2000.0).steps_for(60, 200.0, "heal") == 60
        assert replace_budget(watch, None).steps_for(60, 200.0, "heal") == 60
        assert replace_budget(watch, 310.0).steps_for(60, 200.0, "heal") == 1


def replace_budget(watch: Watch, budget: float | None) -> Any:
    return replace(watch, budget=budget)


def test_times_are_read_as_people_write_them() -> None:
    for text, found in (("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("5 min", 300)):
        assert seconds(text) == found
    assert seconds(None) is None
    for text in ("30", "soon", "0m", ""):
        with pytest.raises(PlanError, match="is no time"):
            seconds(text)
