"""`tune: true`: which settings are timed, which are taken, and what is written beside an engine."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_export.contracts import Work
from prune_export.errors import StageError
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.exporters._shared.tuning import (
    Setting,
    Timed,
    Tuned,
    fastest,
    script_of,
    settings_for,
    tune,
)
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.ort_genai import OrtGenai
from prune_export.exporters.ort_genai.tuned import graphs, write_session
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Export
from prune_export.store import Store
from tests.exporters.ort_genai.test_ort_genai import model_in

MACHINE = Machine("cpu", 4 << 30, 0, 2)
ALONE = replace(MACHINE, threads=1)


def timed(decode: float, **setting: Any) -> Timed:
    return Timed(Setting(2, **setting), decode, 10 * decode)


class TestChoice:
    def test_every_way_of_waiting_is_timed_with_all_threads_and_half(self) -> None:
        found = {(one.threads, one.spinning) for one in settings_for(MACHINE)}
        assert found == {(2, False), (2, True), (1, False)}
        assert {one.threads for one in settings_for(replace(MACHINE, threads=8))} == {8, 4}

    def test_levels_are_timed_once(self) -> None:
        levels = [{"accuracy_level": 4}, {"accuracy_level": 1}]
        found = settings_for(MACHINE, levels)
        assert [one.keys for one in found].count({"accuracy_level": 1}) == 1
        assert found[0].label == "2 threads, accuracy_level 1"

    def test_what_asks_for_less_is_taken_where_it_is_as_fast(self) -> None:
        plain, spinning = timed(0.0102), timed(0.0100, spinning=True)
        assert fastest([spinning, plain]) is plain
        assert fastest([spinning, timed(0.02)]) is spinning

    def test_both_ways_are_named(self) -> None:
        found = Tuned([timed(0.01), timed(0.005, spinning=True, huge_pages=True)])
        assert found.note() == (
            "tuned here: 200 tokens/s with 2 threads, spinning, huge pages, 100 with 2 threads, "
            "as speed is verified"
        )
        busy = replace(
            found, busy=" on a busy machine (load 9.0 on 2 cores; tune it again at rest)"
        )
        assert busy.note().startswith("tuned here on a busy machine (load 9.0 on 2 cores")
        assert "gain nothing" in Tuned([timed(0.01), timed(0.01, spinning=True)]).note()


class TestWhatIsWritten:
    def test_the_script_starts_a_command_so(self, tmp_path: Path) -> None:
        found = Tuned([timed(0.01), timed(0.005, spinning=True, huge_pages=True)])
        found.write(tmp_path, MACHINE)
        said = json.loads((tmp_path / "tuned.json").read_text())
        assert said["best"] == {
            "threads": 2, "spinning": True, "huge_pages": True, "keys": {}
        }  # fmt: skip
        assert len(said["measured"]) == 2
        script = tmp_path / "run.sh"
        shown = subprocess.run(
            ["sh", script, "sh", "-c", 'echo "$GLIBC_TUNABLES, $1"', "x", "two words"],
            check=True, capture_output=True, text=True, env={"PATH": os.environ["PATH"]},
        ).stdout  # fmt: skip
        assert shown == "glibc.malloc.hugetlb=1, two words\n"
        assert "GLIBC_TUNABLES" not in script_of(Setting(2, spinning=True))

    def test_onnxruntime_genai_is_told_threads_and_spinning(self, tmp_path: Path) -> None:
        config = tmp_path / "genai_config.json"
        config.write_text(json.dumps({"model": {"decoder": {"session_options": {"log_id": "x"}}}}))
        write_session(config, Tuned([timed(0.01, spinning=True)]))
        said = json.loads(config.read_text())["model"]["decoder"]["session_options"]
        assert said == {
            "log_id": "x", "intra_op_num_threads": 2, "session.intra_op.allow_spinning": "1"
        }  # fmt: skip


class TestGraphs:
    def test_blocks_heads_and_levels_are_tried(self) -> None:
        asked = OrtGenai(precision="int4")
        assert list(graphs(asked, quantized=False)) == [
            asked, replace(asked, block_size=64), replace(asked, block_size=128),
            replace(asked, head="int8"), replace(asked, accuracy_level=1),
        ]  # fmt: skip

    def test_codes_of_a_checkpoint_keep_their_groups(self) -> None:
        asked = OrtGenai(precision="int4")
        assert {one.block_size for one in graphs(asked, quantized=True)} == {32}
        assert list(graphs(OrtGenai(precision="fp32"), quantized=False)) == [
            OrtGenai(precision="fp32")
        ]


def test_an_engine_is_timed_in_processes_of_its_own(tiny_graph: Path, tmp_path: Path) -> None:
    work = Work(ALONE, Silent(), tmp_path)
    settings = [Setting(1), Setting(1, huge_pages=True)]
    found = tune(tiny_graph.parent, "onnx", {}, settings, 64, work)
    assert [one.setting for one in found.times] == settings
    assert all(one.decode > 0 and one.prefill > 0 for one in found.times)
    (tmp_path / "none").mkdir()
    with pytest.raises(StageError, match="leave `tune` out"):
        tune(tmp_path / "none", "onnx", {}, settings[:1], 64, work)


@pytest.mark.usefixtures("genai_in_this_process")
def test_a_tuned_engine_says_what_was_found(tmp_path: Path) -> None:
    model_in(tmp_path / "model", "Llama", {})
    record = OrtGenai(precision="fp32", tune=True).export(
        tmp_path / "model", tmp_path / "out", Work(ALONE, Silent(), tmp_path / "scratch")
    )
    assert record.parameters["tune"] is True
    assert any(note.startswith("tuned here") for note in record.notes)
    assert any(note.startswith("graphs tried here: block_size 32: ") for note in record.notes)
    assert (tmp_path / "out" / "run.sh").is_file()
    said = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert said["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 1


def test_a_tuned_engine_is_of_this_machine(tmp_path: Path) -> None:
    """Its id says which one; that of any other engine does not change."""
    model = tmp_path / "model"
    model_in(model, "Llama", {})

    def id_of(entry: Any, machine: Machine) -> str:
        said: list[str] = []

        class Heard(RunContext):
            def make(self, key: Any, label: str, build: Any) -> Any:
                del label, build
                said.append(key.id)

        context = Heard(Store(tmp_path / "store"), machine, Silent())
        export_engine(context, Export("onnx", entry), model, "source")
        return said[0]

    assert id_of(Onnx(), MACHINE) == id_of(Onnx(), ALONE)
    assert id_of(Onnx(tune=True), MACHINE) != id_of(Onnx(tune=True), ALONE)
    assert id_of(Onnx(tune=True), MACHINE) != id_of(Onnx(), MACHINE)
