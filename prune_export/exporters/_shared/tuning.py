"""Finds the settings under which an engine decodes fastest on this machine (`tune: true`).

Threads, whether they spin while they wait, and huge pages change no result, and are written beside
the engine, not into it: `tuned.json` says what was measured, `run.sh` starts a command so. Speeds
that are verified are measured without any of it, so both are named.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from prune_export.contracts import Work
from prune_export.errors import StageError
from prune_export.machine import Machine
from prune_export.system.platforms import usable_cores

TUNED: Final = "tuned.json"
SCRIPT: Final = "run.sh"
HUGE_PAGES: Final = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Asks glibc's malloc for 2 MiB pages, which the kernel must allow (`madvise` or `always`)."""

TUNING_S: Final = 30.0
"""What timing the settings of a small engine takes; of a large one, loading it several times."""

_PROMPT, _NEW, _ROUNDS = 16, 24, 3
_BUSY: Final = 1.5
"""The load over the cores from which on times say little of a machine at rest."""
_WORTH: Final = 1.03
"""How many times as fast a setting must be to be taken before one that asks for less."""


@dataclass(frozen=True)
class Setting:
    """How an engine is run; `keys` replaces keys of its exporter that opening it reads."""

    threads: int
    spinning: bool = False
    huge_pages: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """It in words: `2 threads, spinning, huge pages`."""
        parts = [f"{self.threads} threads" if self.threads > 1 else "1 thread"]
        parts += ["spinning"] if self.spinning else []
        parts += ["huge pages"] if self.huge_pages else []
        return ", ".join([*parts, *(f"{key} {value}" for key, value in self.keys.items())])

    @property
    def asks(self) -> int:
        """How much it asks of whoever runs the engine."""
        return self.spinning + self.huge_pages


@dataclass(frozen=True)
class Timed:
    """What a setting came to: median seconds of a decoding step, and of a short prompt."""

    setting: Setting
    decode: float
    prefill: float


@dataclass(frozen=True)
class Tuned:
    """All settings that were timed, and the fastest, with and without spinning threads."""

    times: Sequence[Timed]
    busy: str = ""
    """What else the machine did before, in words; empty where that was little."""

    @property
    def best(self) -> Timed:
        """The fastest; of those within 3 % of it, the one that asks for least."""
        return fastest(self.times)

    @property
    def quiet(self) -> Timed:
        """The fastest of those whose threads do not spin, and that need no huge pages."""
        return fastest([one for one in self.times if not one.setting.asks])

    def note(self) -> str:
        """What was found, in a sentence."""
        best, quiet = self.best, self.quiet
        told = f"tuned here{self.busy}: {1 / best.decode:,.0f} tokens/s with {best.setting.label}"
        if best is quiet:
            return f"{told}; spinning threads and huge pages gain nothing"
        return f"{told}, {1 / quiet.decode:,.0f} with {quiet.setting.label}, as speed is verified"

    def to_json(self, machine: Machine) -> dict[str, Any]:
        """What `tuned.json` says."""
        return {
            "machine": machine.timing_identity(),
            "best": asdict(self.best.setting),
            "without_spinning": asdict(self.quiet.setting),
            "measured": [
                asdict(one.setting) | {"decode_s": one.decode, "prefill_s": one.prefill}
                for one in self.times
            ],
        }

    def write(self, out: Path, machine: Machine) -> None:
        """Writes `tuned.json` and the script beside an engine."""
        text = json.dumps(self.to_json(machine), indent=2, sort_keys=True)
        (out / TUNED).write_text(text + "\n", encoding="utf-8")
        script = out / SCRIPT
        script.write_text(script_of(self.best.setting), encoding="utf-8", newline="\n")
        script.chmod(0o755)


def fastest(times: Sequence[Timed]) -> Timed:
    """The fastest by decoding; of those within 3 % of it, the one that asks for least."""
    least = min(one.decode for one in times)
    near = [one for one in times if one.decode <= _WORTH * least]
    return min(near, key=lambda one: (one.setting.asks, one.decode))


def script_of(setting: Setting) -> str:
    """A shell script that starts a command under a setting."""
    lines = [
        "#!/bin/sh",
        "# Starts a command as this engine decoded fastest where it was made (tuned.json):",
        "#   ./run.sh python serve.py",
        f"# {setting.label}. Threads and spinning are options of the session:",
        f"#   intra_op_num_threads = {setting.threads}",
        f"#   session.intra_op.allow_spinning = {int(setting.spinning)}",
    ]
    if setting.huge_pages:
        lines += [f"export {name}={value}" for name, value in HUGE_PAGES.items()]
    return "\n".join([*lines, 'exec "$@"', ""])


def settings_for(machine: Machine, keys: Sequence[Mapping[str, Any]] = ({},)) -> list[Setting]:
    """The settings to time on a machine: all threads and half of them, spinning or not, and pages.

    `keys` are those of the exporter to try; each is tried with all threads only.
    """
    threads = dict.fromkeys((machine.threads, max(1, machine.threads // 2)))
    found = [Setting(machine.threads, keys=one) for one in keys[1:]]
    for huge in (False, True) if platform.libc_ver()[0] == "glibc" else (False,):
        for count in threads:
            spins = (False, True) if count > 1 else (False,)
            found += [Setting(count, spinning, huge, keys[0]) for spinning in spins]
    return found


def tune(
    path: Path,
    exporter: str,
    keys: Mapping[str, Any],
    settings: Sequence[Setting],
    vocab: int,
    work: Work,
) -> Tuned:
    """Times the engine at `path` under each setting, those with huge pages in their own process.

    Raises:
        StageError: it does not run.
    """
    times: list[Timed] = []
    busy = how_busy()
    with work.progress.task(f"{exporter}: settings", len(settings)) as task:
        for huge in dict.fromkeys(one.huge_pages for one in settings):
            own = [one for one in settings if one.huge_pages == huge]
            asked = {
                "path": str(path.resolve()),
                "exporter": exporter,
                "keys": dict(keys),
                "settings": [asdict(one) | {"keys": dict(one.keys)} for one in own],
                "prompt": _PROMPT,
                "new": _NEW,
                "rounds": _ROUNDS,
                "vocab": vocab,
            }
            found = _in_process(asked, work, HUGE_PAGES if huge else {})
            times += [Timed(one, *seconds) for one, seconds in zip(own, found, strict=True)]
            task.advance(len(own))
    return Tuned(times, busy)


def how_busy() -> str:
    """Says whether others have kept this machine busy for the last minute: then tune again."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = usable_cores()
    if load < _BUSY * cores:
        return ""
    return f" on a busy machine (load {load:.1f} on {cores} cores; tune it again at rest)"


def _in_process(
    asked: Mapping[str, Any], work: Work, environment: Mapping[str, str]
) -> list[tuple[float, float]]:
    work.scratch.mkdir(parents=True, exist_ok=True)
    request = work.scratch / "tuning.json"
    request.write_text(json.dumps(asked, sort_keys=True), encoding="utf-8")
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    ended = subprocess.run(
        [sys.executable, "-m", f"{__package__}.tuning_child", str(request)],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONPATH": path} | dict(environment),
    )
    if ended.returncode:
        last = " | ".join([line for line in ended.stderr.splitlines() if line.strip()][-3:])
        raise StageError(
            f"{asked['exporter']}: tuning",
            f"timing the engine ended with {ended.returncode}: {last[:600]}",
            "leave `tune` out",
        )
    return [(one[0], one[1]) for one in json.loads(ended.stdout.splitlines()[-1])]
