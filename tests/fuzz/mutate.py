"""Damages inputs at random and feeds them to every door: only our own errors may come out.

    python tests/fuzz/mutate.py --count 100000 --seed 1 [--door config]

reports every other exception once a kind, calls over 5 s, and memory that grew by over 500 MB. The
same seed and count give the same inputs. `test_mutations` runs some of them in CI. A door is a
name, a valid input, and what reads it; add yours to `doors.DOORS`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prune_export.errors import PruneExportError

SLOW_SECONDS = 5.0
HANG_SECONDS = 20
GROWTH_BYTES = 500_000_000

Kind = Literal["json", "text", "bytes", "safetensors", "gguf"]
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**9, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30,
    10**400, 0.5, -0.0, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf, "", "0", "a",
    "x" * 5000, "\0", "\x1b[31m", "[/red]", "..", "../../etc/passwd", "/dev/zero", "~", "café",
    "\ud800", "\u202e", "NaN", "{{ 1 }}", [], [[]], {}, {"a": 1}, [1, "a", None], {"": {}},
    [0] * 2000, ["a"] * 300,
)  # fmt: skip
NUMBERS = (0, 1, 2, 31, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Door:
    """Where outside data come in: `make` writes a valid folder, `call` reads it.

    `file` in it is what is damaged.

    `weight` is how often it is chosen; heavy calls have less.
    """

    name: str
    file: str
    kind: Kind
    make: Callable[[Path], None]
    call: Callable[[Path], object]
    weight: float = 1.0


@dataclass
class Findings:
    """What went wrong; the first example of each kind of fault is kept."""

    tried: int = 0
    refused: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.faults.setdefault(kind, example)
        self.counts[kind] = self.counts.get(kind, 0) + 1


class HangError(BaseException):
    """Raised by the alarm, and by nothing that is caught on the way."""


def run(doors: Sequence[Door], count: int, seed: int, folder: Path) -> Findings:
    """Feeds `count` damaged inputs to the doors."""
    chosen = random.Random(seed)
    found = Findings()
    valid: dict[str, tuple[Path, bytes]] = {}
    for door in doors:
        place = folder / door.name
        place.mkdir(parents=True)
        door.make(place)
        valid[door.name] = place, (place / door.file).read_bytes()
        door.call(place)  # what is not damaged passes
    start = _peak_bytes()
    signal.signal(signal.SIGALRM, _hang)
    weights = [door.weight for door in doors]
    for number in range(count):
        door = chosen.choices(doors, weights)[0]
        place, data = valid[door.name]
        damaged = mutated(chosen, door.kind, data)
        (place / door.file).write_bytes(damaged)
        _feed(door, place, f"{door.name} #{number} seed {seed}", damaged, found)
        (place / door.file).write_bytes(data)
        if _peak_bytes() - start > GROWTH_BYTES:
            found.add(f"{door.name}: memory", f"#{number} seed {seed}: {damaged[:300]!r}")
            start = _peak_bytes()
    return found


def _feed(door: Door, place: Path, where: str, damaged: bytes, found: Findings) -> None:
    began = time.process_time()
    found.tried += 1
    signal.alarm(HANG_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            door.call(place)
    except PruneExportError as error:
        found.refused += 1
        try:
            str(error).encode()
        except UnicodeEncodeError:
            found.add(f"{door.name}: unprintable", f"{where}: {error!a:.300}")
    except HangError:
        found.add(f"{door.name}: hangs", f"{where}: {damaged[:300]!r}")
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{door.name}: {type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
        found.add(kind, f"{where}\n{''.join(traceback.format_exception(error))[-1500:]}")
    finally:
        signal.alarm(0)
    if time.process_time() - began > SLOW_SECONDS:
        found.add(f"{door.name}: slow", f"{where}: {damaged[:300]!r}")


def mutated(chosen: random.Random, kind: Kind, data: bytes) -> bytes:
    """`data`, damaged once to three times."""
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        structured = chosen.random() < 0.8
        if kind == "json" and structured:
            data = _json(chosen, data)
        elif kind == "safetensors" and structured:
            data = _safetensors(chosen, data)
        elif kind == "gguf" and structured:
            data = _gguf(chosen, data)
        elif kind == "text" and structured:
            data = _text(chosen, data)
        else:
            data = _bytes(chosen, data)
    return data


def _json(chosen: random.Random, data: bytes) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(chosen, data)
    if chosen.random() < 0.03:
        depth = chosen.choice((65, 500, 100_000))
        left, right = chosen.choice((("[", "]"), ('{"a":', "}")))
        deep = left * depth + "0" + right * depth
        at = chosen.choice((0, data.find(b":") + 1))
        return data[:at] + deep.encode() + data[at:] if at else deep.encode()
    places = list(_places(tree))
    if not places:
        return json.dumps(chosen.choice(HOSTILE)).encode()
    parent, key = chosen.choice(places)
    action = chosen.choice(("drop", "replace", "replace", "replace", "rename", "double"))
    if action == "drop":
        del parent[key]
    elif action == "replace":
        parent[key] = chosen.choice(HOSTILE)
    elif action == "rename" and isinstance(parent, dict):
        parent[chosen.choice(("", "x" * 300, "\x1b", "__class__", str(key).upper()))] = parent.pop(
            key
        )
    elif isinstance(parent, list):
        parent.extend(parent[: chosen.choice((1, 1000))])
    elif type(parent[key]) is int:
        parent[key] *= chosen.choice((-1, 0, 2, 1000, 10**12))
    elif isinstance(parent[key], float):
        parent[key] *= chosen.choice((-1, 0, 1.5, 1e12))
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value in a tree."""
    level = [tree] if isinstance(tree, dict | list) else []
    while level:
        below: list[Any] = []
        for one in level:
            keys = list(one) if isinstance(one, dict) else range(len(one))
            for key in keys:
                yield one, key
                if isinstance(one[key], dict | list):
                    below.append(one[key])
        level = below


def _safetensors(chosen: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return _bytes(chosen, data)
    header = _json(chosen, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _gguf(chosen: random.Random, data: bytes) -> bytes:
    """Replaces a value of the metadata by one of another type; the rest stays as it is."""
    keys = (b"general.alignment", b"split.count", b"general.architecture", b"llama.block_count",
            b"general.license", b"any.key")  # fmt: skip
    key = chosen.choice(keys)
    kind, value = chosen.choice(
        [(4, struct.pack("<I", chosen.choice(NUMBERS) % 2**32)), (5, struct.pack("<i", -1)),
         (6, struct.pack("<f", chosen.choice((math.nan, math.inf, -math.inf, 0.5)))),
         (10, struct.pack("<Q", chosen.choice(NUMBERS) % 2**64)), (7, b"\2"),
         (12, struct.pack("<d", math.nan)), (8, struct.pack("<Q", 3) + b"a\xff\0"),
         (9, struct.pack("<IQ", 4, chosen.choice(NUMBERS)))]
    )  # fmt: skip
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    if len(data) < 24:
        return _bytes(chosen, data)
    pairs = struct.unpack_from("<Q", data, 16)[0]
    return data[:16] + struct.pack("<Q", (pairs + 1) % 2**64) + pair + data[24:]


def _text(chosen: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = chosen.randrange(len(lines))
    tricks = (
        b"!!float x", b"!!timestamp 2020-99-99", b"2020-13-45", b"!!python/object:os.system a",
        b"&a [*a, *a]", b"<<: *a", b"[" * 5000, b"{a: " * 200, b'"\\UFFFFFFFF"', b'"\\uD800"',
        b"? [a]", b"a: b: c", b"\t", b"---", b"...", b"%YAML 9.9", b"1" * 5000,
        b"0x" + b"f" * 400, b"1e999",
        b".nan", b"-.inf", b"\x00", b"\xff\xfe", b"| \n x", b"!<tag:x> y", b"=", b"null",
        b"12:30:45",
    )  # fmt: skip
    trick = chosen.choice(tricks)
    action = chosen.choice(("value", "value", "line", "drop", "double"))
    if action == "value" and b":" in lines[at]:
        lines[at] = lines[at].split(b":")[0] + b": " + trick
    elif action == "drop":
        del lines[at]
    elif action == "double":
        lines.insert(at, lines[at])
    else:
        lines.insert(at, trick)
    return b"\n".join(lines)


def _bytes(chosen: random.Random, data: bytes) -> bytes:
    if not data:
        return bytes([chosen.randrange(256)])
    most = len(data) if chosen.random() < 0.5 else min(len(data), 400)
    at = chosen.randrange(most)
    action = chosen.choice(("flip", "cut", "number", "number", "insert", "remove", "repeat"))
    if action == "flip":
        return data[:at] + bytes([data[at] ^ (1 << chosen.randrange(8))]) + data[at + 1 :]
    if action == "cut":
        return data[:at]
    if action == "number":
        size = chosen.choice((1, 2, 4, 8))
        number = chosen.choice(NUMBERS) % 2 ** (8 * size)
        return data[:at] + number.to_bytes(size, "little") + data[at + size :]
    stop = min(len(data), at + chosen.choice((1, 4, 16, 200)))
    if action == "insert":
        return data[:at] + chosen.randbytes(stop - at) + data[at:]
    if action == "remove":
        return data[:at] + data[stop:]
    return data[:at] + data[at:stop] * chosen.choice((2, 50)) + data[stop:]


def _hang(*_: object) -> None:
    raise HangError


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Tries many, and prints what was found; exit status 1 where anything was."""
    from doors import DOORS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--door", action="append", help="only doors whose name has this in it")
    asked = parser.parse_args()
    doors = [door for door in DOORS if not asked.door or any(d in door.name for d in asked.door)]
    with tempfile.TemporaryDirectory(prefix="prune-export-fuzz-") as folder:
        found = run(doors, asked.count, asked.seed, Path(folder))
    for kind, example in found.faults.items():
        print(
            f"== {kind} ({found.counts[kind]} times)\n{example.encode('ascii', 'replace').decode()}"
        )
    print(f"{found.tried} tried, {found.refused} refused, {sum(found.counts.values())} faults")
    return bool(found.faults)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    sys.exit(main())
