"""--time: what is optional is left out, last in, first out, and what is in hand is proved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.calibrate import TokenSet
from prune_export.contracts import Cost, Work
from prune_export.execution import Options, run
from prune_export.execution.context import RunContext
from prune_export.execution.optional import OutOfTime, optional
from prune_export.execution.proving import quality_in_time, speed_in_time
from prune_export.execution.watch import Watch
from prune_export.machine import Machine
from prune_export.planning import PlannedStage, Size
from prune_export.progress import Silent
from prune_export.recipe import Recipe, Speed
from prune_export.store import Key, Store

SEARCH = """\
recipe: 1
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
  ranking: {files: [evaluation.txt], samples: 16, length: 32}
stages:
  - search:
      target: {parameters: %s, tolerance: 0.3}
      candidates:
        - prune: {method: deepest, sparsity: to_target}
        - prune: {method: every_other, sparsity: to_target}
        - prune: {method: structured_magnitude, sparsity: to_target}
      engines: [onnx: {precision: fp32}, onnx: {precision: int8}]
      validation: ranking
      heal: {method: lora, rank: 2, steps: 4, batch: 1}
  - heal: {method: lora, rank: 2, steps: 8, batch: 1}
verify: {parity: false, quality: {perplexity: ranking}}
"""
SIZE = Size(1, 1, 1)


class Clock:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("prune_export.execution.watch.time.monotonic", clock)
    return clock


def staged(kind: str, took: float, name: str = "x", **parts: float) -> PlannedStage:
    return PlannedStage(kind, name, {}, SIZE, SIZE, Cost(), took, parts=parts)


def watched(budget: float | None = 1000.0) -> Watch:
    planned = [
        staged("search", 400.0, engine=40.0, prune=20.0, heal=60.0, size=50.0),
        staged("heal", 200.0),
        staged("export", 20.0),
        staged("verify", 60.0, "quality"),
        staged("verify", 60.0, "speed"),
        staged("report", 10.0),
    ]
    return Watch(planned, budget, began=0.0)


def work(watch: Watch, clock: Clock, kind: str, seconds: float, share: float = 1.0) -> None:
    with watch.piece(kind, share):
        watch._built += 1
        clock.now += seconds


class TestPace:
    def test_pieces_tell_how_long_the_next_ones_take(self, clock: Clock) -> None:
        watch = watched()
        assert (watch.expected("engine"), watch.ratio) == (40.0, 1.0)
        work(watch, clock, "engine", 120.0)
        assert watch.expected("engine") == 120.0
        assert watch.ratio == pytest.approx(3.0)
        assert watch.expected("prune") == pytest.approx(60.0)  # as slow, as far as one knows
        work(watch, clock, "heal", 15.0, share=0.25)
        assert watch.expected("heal") == 60.0

    def test_what_came_from_the_store_is_no_measure(self, clock: Clock) -> None:
        watch = watched()
        with watch.piece("engine"):
            clock.now += 1.0
        assert watch.expected("engine") == 40.0

    def test_what_must_follow_is_kept_free(self, clock: Clock) -> None:
        watch = watched()
        # 150 s of proof and a fifth of the heal follow: 190 s.
        clock.now = 1000.0 - 40.0 - 190.0
        assert watch.affords({"engine": 1})
        clock.now += 1.0
        assert not watch.affords({"engine": 1})
        assert watch.affords({"engine": 1}, healed=False)
        assert replace(watch, budget=None).affords({"engine": 100})

    def test_a_slow_machine_keeps_more_of_it(self, clock: Clock) -> None:
        watch = watched()
        work(watch, clock, "engine", 400.0)
        assert watch.left == 600.0
        assert not watch.affords({"prune": 1})

    def test_heals_share_the_time(self, clock: Clock) -> None:
        watch = watched(350.0)
        assert watch.steps_for(100, 200.0, "heal") == 100
        assert watch.steps_for(100, 200.0, "heal", later=200.0) == 50
        del clock


class TestProof:
    def context(self, tmp_path: Path, left: float) -> RunContext:
        watch = watched(left)
        machine = Machine.detect(device="cpu", threads=1)
        return RunContext(Store(tmp_path), machine, Silent(), watch=watch)

    def test_texts_are_cut_and_generation_goes_first(self, tmp_path: Path, clock: Clock) -> None:
        del clock
        text = TokenSet.of(torch.arange(160).view(20, 8))
        recipe: Any = Recipe.parse(SEARCH % 0.5)
        same, data = quality_in_time(self.context(tmp_path, 131.0), recipe, {"ranking": text})
        assert same is recipe
        assert data["ranking"] is text
        context = self.context(tmp_path, 100.0)
        fewer, data = quality_in_time(context, recipe, {"ranking": text})
        assert not fewer.verify.generation
        assert data["ranking"].samples == 20
        context = self.context(tmp_path, 50.0)
        fewer, data = quality_in_time(context, recipe, {"ranking": text})
        assert data["ranking"].samples == 10  # 20 s of 40 are left for what depends on the text
        assert torch.equal(data["ranking"].ids, text.ids[:10])
        assert data["ranking"].fingerprint != text.fingerprint
        assert len(context.pace.notes) == 2
        late = self.context(tmp_path, 1.0)
        assert quality_in_time(late, recipe, {"ranking": text})[1]["ranking"].samples == 4

    def test_engines_are_timed_for_what_is_left(self, tmp_path: Path, clock: Clock) -> None:
        del clock
        asked = Speed(minutes=3)
        assert speed_in_time(self.context(tmp_path, 190.0), asked, 1) is asked
        assert speed_in_time(self.context(tmp_path, 130.0), asked, 1).minutes == pytest.approx(2.0)
        assert speed_in_time(self.context(tmp_path, 130.0), asked, 2).minutes == pytest.approx(1.0)
        assert speed_in_time(self.context(tmp_path, 0.0), asked, 2).minutes == pytest.approx(0.5)


class TestOptionalWork:
    def test_it_is_given_up_when_it_is_late(self, tmp_path: Path, clock: Clock) -> None:
        watch = watched(100.0)
        context = RunContext(
            Store(tmp_path), Machine.detect(device="cpu", threads=1), Silent(), watch=watch
        )
        short = optional(context, lambda: watch.left < 50.0)

        def build(files: Path, work: Work) -> dict[str, Any]:
            with work.progress.task("it", 4) as task:
                for _ in range(4):
                    clock.now += 20.0
                    task.advance()
            (files / "a").write_text("a")
            return {}

        key = Key("test", "it", "1", {}, ())
        with pytest.raises(OutOfTime):
            short.make(key, "it", build)
        assert clock.now == 60.0
        assert context.store.get(key.id) is None
        context.make(key, "it", build)  # what must be done is not given up
        assert context.store.get(key.id) is not None

    def test_without_a_limit_it_is_not(self, tmp_path: Path) -> None:
        context = RunContext(Store(tmp_path), Machine.detect(device="cpu", threads=1), Silent())
        assert optional(context, lambda: True) is context


class Slow(Silent):
    """A machine on which every artifact takes its time, by the run's clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        if text.startswith(("prune:", "heal:", "export:", "verify: ")) and "short" not in text:
            self.clock.now += 0.0 if "already there" in text else self.seconds


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_a_slow_machine_keeps_the_time(
    tiny_llama: Path, corpus: Path, tmp_path: Path, clock: Clock
) -> None:
    """No dense engine reaches the target, so one candidate must be pruned, healed and proved."""
    machine = Machine.detect(device="cpu", threads=1)
    slow = Slow(clock, 20.0)
    options = Options(tmp_path / "out", tmp_path / "store", machine, seconds=400.0)
    result = run(Recipe.parse(SEARCH % 0.3, root=corpus), str(tiny_llama), options, slow)
    report = json.loads((result.out / "report.json").read_text())
    (table,) = report["searches"]
    assert table["chosen"].startswith("deepest, ")
    assert any("as time was short" in note for note in report["notes"]), report["notes"]
    assert clock.now <= 1.15 * 400.0, slow.said
    assert next(one.name for one in result.verification.perplexity) == "dense"


def test_without_a_limit_nothing_is_left_out(clock: Clock) -> None:
    watch = watched(None)
    work(watch, clock, "engine", 1e6)
    assert watch.affords({"engine": 1e6, "heal": 1e6})
