"""Makes a plan: resolves each stage against the shapes before it, and estimates its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from math import inf, prod
from pathlib import Path
from typing import Any, Final

from prune_export import registry
from prune_export.ablated import Ablated
from prune_export.arch import Arch
from prune_export.calibrate import Tokenizer, pass_cost
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Cost, HasPlanNote, HasSparsity, Refitting, TracksAblations
from prune_export.deriving.cache import derived_note
from prune_export.errors import MissingExtra, PlanError
from prune_export.machine import Machine
from prune_export.planning.choices import exported, left_of, tokens_judged
from prune_export.planning.data import refuse_too_little, source_of
from prune_export.planning.devices import HERE, Devices
from prune_export.planning.grid_rules import refuse_lost_grids
from prune_export.planning.limits import windows_of, with_lacking
from prune_export.planning.own_data import data_notes
from prune_export.planning.planned import Plan, PlannedStage, Rates, Size, together
from prune_export.planning.positions import refuse_long_requests, refuse_long_text
from prune_export.planning.sparsity_notes import packed_note, windows_note
from prune_export.planning.sparsity_rules import Planned, refuse_impossible
from prune_export.planning.talks import talks_of
from prune_export.planning.teacher import teacher_of
from prune_export.planning.wrapped import further_notes, packed_notes, with_rest, wrapped_notes
from prune_export.recipe import (
    Recipe,
    Search,
    Stage,
    engines_of,
    heal_of,
    templates,
    unreached,
)
from prune_export.units import MIB
from prune_export.verify.generation import refuse_unknown_prompts

_PROCESS_BYTES: Final = 700 * MIB
"""Python with torch and transformers imported, with room; every stage's process holds it."""

_TO_COMPARE: Final = ", to compare with"
"""How the note of an engine ends that is only measured against."""

_TIMING_S: Final = 35.0
"""What timing an engine of a search takes: its limit is 45 s, and most end before it."""

_LEAST_TIMED_S: Final = 30.0
"""What the fewest launches take that make an interval: nine processes, on a machine at rest."""

_ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
_REPORT_BYTES: Final = 32 * MIB


def make_plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    machine: Machine,
    *,
    model: str,
    store: Path,
    out: Path,
    ram_limit: int | None = None,
    ignore_keys: tuple[str, ...] = (),
    imported: str = "",
    devices: Devices = HERE,
    rates: Rates | None = None,
) -> Plan:
    """Plans a recipe for a model: resolves, costs and checks every stage.

    `checkpoint` may be only a config. `imported` says what it is to be dequantized from first.
    `ram_limit` in bytes replaces the available memory as what must not be exceeded. What this
    machine lacks is in `Plan.lacking`, so that the plan can be looked at all the same; for
    `devices` that are not here it is what these lack, and of memory only a `ram_limit` is known.

    Raises:
        PlanError: something in it cannot work, with the stage and what to do.
        UnsupportedArch: the model is not one that the tables describe.
    """
    arch = checkpoint.arch(ignore_keys=ignore_keys)
    if rates is None:
        rates = Rates.known(devices.flops) if devices.elsewhere else Rates.measure(machine)
    machine = devices.machine(machine)
    planner = _Planner(recipe, checkpoint, machine, rates, arch, ignore_keys, devices)
    stages, archs = ([planner.imported(arch, imported)] if imported else []), [arch]
    ablated = Ablated()
    stages += talks_of(recipe, checkpoint, arch, machine, planner.planned)
    for index, stage in enumerate(recipe.stages):
        (planned, arch), before = planner.stage(index, stage, arch), arch
        ablated = planner.ablated(index, stage, before, ablated)
        stages.append(planned)
        archs.append(arch)
    whole = Planned(recipe, tuple(archs), machine)
    refuse_impossible(whole)
    refuse_lost_grids(recipe)
    refuse_long_requests(recipe, (archs[0], archs[-1]))
    stages += planner.exports(whole)
    stages += planner.verification(archs[0], arch)
    stages.append(planner.result(arch, stages))
    refuse_too_little(recipe, checkpoint.path, archs[0].sizes["vocab"])
    if recipe.verify.generation and Tokenizer.lies_in(checkpoint.path):
        refuse_unknown_prompts(checkpoint.path, archs[0].sizes["vocab"])
    plan = Plan(recipe.name, model, arch.family, tuple(stages), machine, tuple(archs))
    notes = (*wrapped_notes(recipe, checkpoint), *further_notes(checkpoint, archs[0]))
    notes += tuple(filter(None, [derived_note(archs[0].table)]))
    notes += (*packed_notes(imported), *data_notes(recipe))
    plan = dataclasses.replace(plan, devices=devices, notes=notes)
    return with_lacking(plan, recipe, checkpoint.path, store, out, ram_limit)


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    checkpoint: Checkpoint
    machine: Machine
    rates: Rates
    dense: Arch
    ignore_keys: tuple[str, ...] = ()
    devices: Devices = HERE

    def size(self, arch: Arch) -> Size:
        return Size(arch.layers, arch.parameters(), arch.parameters() * self.item_bytes())

    def item_bytes(self) -> int:
        if self.checkpoint.entries:
            stored = sum(prod(entry.shape) for entry in self.checkpoint.entries.values())
            return max(1, round(self.checkpoint.nbytes / max(stored, 1)))
        config = self.checkpoint.config
        return _ITEM_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)

    def planned(
        self,
        kind: str,
        name: str,
        parameters: Mapping[str, Any],
        before: Arch,
        after: Arch,
        cost: Cost,
        note: str = "",
    ) -> PlannedStage:
        sizes, seconds = (self.size(before), self.size(after)), self.rates.seconds(cost)
        cost = with_rest(cost, kind, self.checkpoint)
        return PlannedStage(kind, name, parameters, *sizes, cost, seconds, note)

    def imported(self, arch: Arch, source: str) -> PlannedStage:
        size = self.size(arch)
        whole = source == "gguf"  # others pass through memory a tensor at a time
        cost = Cost(
            # Measured of a GGUF: 1.4 and 1.8 times its float32 bytes.
            ram_bytes=450 * MIB + round(1.8 * size.bytes) if whole else _PROCESS_BYTES,
            disk_bytes=size.bytes,
            moved_bytes=2 * size.bytes,
            seconds=6,
        )
        dtype = "float32" if whole else str(arch.config.get("dtype") or "bfloat16")
        note = f"dequantized once to {dtype}"
        return self.planned("import", source, {}, arch, arch, cost, note)

    def stage(self, index: int, stage: Stage, arch: Arch) -> tuple[PlannedStage, Arch]:
        how = {
            "prune": self._prune,
            "quantize": self._prune,
            "heal": self._heal,
            "search": self._search,
        }[stage.kind]
        with self._named(index, stage):
            planned, after = how(stage, arch)
        if stage.round is not None:
            note = f"{stage.round}; {planned.note}".removesuffix("; ")
            planned = dataclasses.replace(planned, note=note)
        return planned, after

    def ablated(self, index: int, stage: Stage, arch: Arch, known: Ablated) -> Ablated:
        """The parts of blocks that are zeroed after a stage, as far as is known.

        Raises:
            PlanError: the stage is to zero more than can be left.
        """
        if stage.kind == "heal" and getattr(stage.entry, "keep_zeros", False) is not False:
            return known
        if stage.kind == "quantize":
            return known
        if stage.kind == "prune" and isinstance(stage.entry, TracksAblations):
            with self._named(index, stage):
                return stage.entry.ablated(arch, known)
        return Ablated()

    @contextmanager
    def _named(self, index: int, stage: Stage) -> Iterator[None]:
        """Adds the stage to the errors raised inside a `with`."""
        try:
            yield
        except PlanError as error:
            where = f"{self.recipe.name}  stages.{index}.{stage.kind}.{stage.title}"
            raise type(error)(where, f"{error.where}: {error.problem}", error.fix) from None

    def _prune(self, stage: Stage, arch: Arch) -> tuple[PlannedStage, Arch]:
        after = stage.entry.predict(arch)
        statistics = stage.entry.statistics(arch)
        cost, note, more = Cost(), "", ""
        if isinstance(stage.entry, Refitting) and (
            stage.data in self.recipe.data or stage.entry.needs_data
        ):
            statistics += stage.entry.passes_with_data(arch)
            more = stage.entry.refit_note(arch)
        if statistics:
            source = source_of(self.recipe, stage)
            samples, length = windows_of(source, self.recipe.root), source.length
            refuse_long_text(f"data.{stage.data}.length", length, arch.config)
            found = pass_cost(arch, statistics, samples, length, self.machine)
            cost = Cost(
                ram_bytes=_PROCESS_BYTES + found.ram_bytes,
                gpu_bytes=found.gpu_bytes,
                disk_bytes=found.disk_bytes,
                flops=found.flops,
                moved_bytes=found.moved_bytes,
                seconds=found.seconds,
            )
            note = f"{samples} x {length} tokens"
        own = stage.entry.note(arch) if isinstance(stage.entry, HasPlanNote) else ""
        note = "; ".join(part for part in (note, own, more) if part)
        written = self.size(after).bytes
        cost = dataclasses.replace(
            cost,
            ram_bytes=max(cost.ram_bytes, _PROCESS_BYTES),
            disk_bytes=cost.disk_bytes + written,
            moved_bytes=cost.moved_bytes + 2 * written,
        )
        keys = stage.parameters()
        return self.planned(stage.kind, stage.name, keys, arch, after, cost, note), after

    def _heal(self, stage: Stage, arch: Arch) -> tuple[PlannedStage, Arch]:
        source = source_of(self.recipe, stage)
        refuse_long_text(f"data.{stage.data}.length", source.length, arch.config)
        stage.entry.check(arch, self.machine)
        samples, machine = windows_of(source, self.recipe.root), self.machine
        machine = machine.share(self.devices.here)
        cost = stage.entry.cost(arch, samples * source.length, source.length, machine)
        note = f"up to {samples} x {source.length} tokens"
        teacher = teacher_of(
            self.recipe, stage.entry, self.checkpoint, self.dense, self.ignore_keys
        )
        if teacher is not None:
            refuse_long_text(f"data.{stage.data}.length", source.length, teacher.config)
            cost, told = stage.entry.taught_cost(arch, teacher, samples, source.length, machine)
            note = f"{note}; {told}"
        parts = int(getattr(stage.entry, "batch", self.devices.count))
        cost = self.devices.shared(cost, parts)
        note = "; ".join(part for part in (note, self.devices.note(parts)) if part)
        return self.planned("heal", stage.name, stage.parameters(), arch, arch, cost, note), arch

    def _search(self, stage: Stage, arch: Arch) -> tuple[PlannedStage, Arch]:
        """Plans a search: the cost of all candidates, and the shapes of the first."""
        search: Search = stage.entry
        # Until an engine is timed, a speed is taken to be in proportion to the parameters.
        left = left_of(search, self.size(arch).bytes)
        healer, total, after = heal_of(search), Cost(), None
        # Where engines are chosen among, pruning may be left to one that needs less of it.
        near = inf if search.target.timed or search.engines else search.target.tolerance
        told: list[str] = []
        fixes: list[str] = []
        fitting = outside = 0
        parts = {"prune": 0.0, "heal": 0.0, "engine": 0.0, "size": 0.0}
        for template in templates(search):
            try:
                candidate = template.near(arch, left, near)
            except PlanError as error:
                outside += template.of_grid
                told += (
                    [] if template.of_grid else [f"{template.label} ({template.why_not(error)})"]
                )
                fixes += [error.fix] if error.fix else []
                continue
            fitting += 1
            before = arch
            steps = []
            for own in candidate.stages:
                planned, before = self._prune(own, before)
                steps.append(planned)
            steps += [self._heal(healer, before)[0]] if healer else []
            for step in steps:
                total = together(total, step.cost)
                parts["heal" if step.kind == "heal" else "prune"] += step.seconds
            after = after or before
        if after is None:
            problem, fix = unreached(told, outside, arch)
            raise PlanError("search", problem, fixes[0] if fixes else fix)
        if search.executor == "ray" and find_spec("ray") is None:
            raise MissingExtra.of("search  executor", "ray", "ray")
        engines = list(engines_of(search))
        timing = _TIMING_S if search.target.timed or search.measure_speed else 0.0
        for option in engines:
            # The dense model and the best pruned one; each is built, judged and timed.
            each = option.export.entry.cost(arch, self.size(arch).bytes)
            judged = 2.0 * arch.parameters() * tokens_judged(self.recipe, search)
            each = dataclasses.replace(
                each, flops=2 * (each.flops + judged), seconds=2 * (each.seconds + timing)
            )
            total = together(total, each)
            parts["engine"] += self.rates.seconds(each) / 2 / len(engines)
            with suppress(PlanError):  # a model that takes no grid does without this engine
                coarse = self._prune(option.quantize, arch)[0] if option.quantize else None
                if coarse is not None:
                    total = together(together(total, coarse.cost), coarse.cost)
                    parts["engine"] += coarse.seconds / len(engines)
        if engines:
            engines[0].export.entry.check(arch, self.machine)
        if search.target.timed or search.measure_speed:
            entry = registry.find("exporters", search.target.engine)()
            entry = engines[0].export.entry if engines else entry
            entry.check(after, self.machine)
            each = entry.cost(after, self.size(after).bytes)
            parts["size"] = self.rates.seconds(each) + _TIMING_S
            count = (3 if search.target.timed else 1) * fitting + 1
            total = together(
                total, dataclasses.replace(each, seconds=(each.seconds + _TIMING_S) * count)
            )
        workers = min(search.workers, fitting)
        total = dataclasses.replace(
            total, ram_bytes=total.ram_bytes * workers, gpu_bytes=total.gpu_bytes * workers
        )
        name = f"the best of {fitting} candidates"
        planned = self.planned("search", name, {}, arch, after, total, "the first one's shapes")
        one = {kind: parts[kind] / fitting for kind in ("prune", "heal")}
        return dataclasses.replace(planned, parts=parts | one), after

    def exports(self, planned: Planned) -> Iterator[PlannedStage]:
        dense, arch = planned.archs[0], planned.after
        for export in exported(self.recipe):
            compared = self.recipe.verify.speed is not None
            notes = (windows_note(planned, export), packed_note(planned, export))
            result = (arch, "; ".join(filter(None, notes)))
            for which, note in [(dense, f"the dense model{_TO_COMPARE}"), result][not compared :]:
                export.entry.check(which, self.machine)
                cost = export.entry.cost(which, self.size(which).bytes)
                yield self.planned(
                    "export", export.name, export.parameters(), which, which, cost, note
                )
            twin = (
                export.entry.without_sparsity() if isinstance(export.entry, HasSparsity) else None
            )
            if compared and twin is not None:
                cost, note = twin.cost(arch, self.size(arch).bytes), f"sparsity off{_TO_COMPARE}"
                keys = dataclasses.replace(export, entry=twin).parameters()
                yield self.planned("export", export.name, keys, arch, arch, cost, note)

    def verification(self, dense: Arch, arch: Arch) -> Iterator[PlannedStage]:
        verify = self.recipe.verify
        heaviest = self.size(dense).parameters * 4 + _PROCESS_BYTES
        flops = 0.0
        if verify.quality and verify.quality.perplexity:
            source = self.recipe.data[verify.quality.perplexity]
            refuse_long_text(
                f"data.{verify.quality.perplexity}.length", source.length, dense.config
            )
            tokens = windows_of(source, self.recipe.root) * source.length
            models = 2 + any(stage.kind == "heal" for stage in self.recipe.stages)
            engines = len(exported(self.recipe)) if verify.quality.engines else 0
            flops = 2.0 * dense.parameters() * tokens * (models + engines)
        cost = Cost(ram_bytes=heaviest, flops=flops, seconds=20)
        yield self.planned("verify", "quality", {}, dense, arch, cost)
        if verify.speed:
            pairs = len(exported(self.recipe)) + sum(
                isinstance(export.entry, HasSparsity)
                and export.entry.without_sparsity() is not None
                for export in exported(self.recipe)
            )
            asked = 40 * verify.speed.minutes * len(verify.speed.workloads)
            seconds = max(asked, _LEAST_TIMED_S) * pairs
            if verify.speed.sweep:
                sweep = verify.speed.sweep
                longest = max(sweep.prompt) + sweep.new
                refuse_long_text("verify.speed.sweep.prompt", longest, arch.config)
                seconds += 60 * sweep.minutes * pairs
            together = 2 * (self.size(dense).parameters * 4 + _PROCESS_BYTES)
            cost = Cost(ram_bytes=together, seconds=seconds)
            yield self.planned("verify", "speed", verify.speed.model_dump(), dense, arch, cost)

    def result(self, arch: Arch, stages: list[PlannedStage]) -> PlannedStage:
        exported = sum(
            stage.cost.disk_bytes
            for stage in stages
            if stage.kind == "export" and not stage.note.endswith(_TO_COMPARE)
        )
        written = self.size(arch).bytes + exported + _REPORT_BYTES
        cost = Cost(ram_bytes=_PROCESS_BYTES, disk_bytes=written, moved_bytes=written, seconds=5)
        return self.planned("report", "report and card", {}, arch, arch, cost)
