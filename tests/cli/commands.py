"""Runs commands of prune-export one after the other, in this process and its locale.

A line of JSON on standard input is a command's arguments; the answer is a line: its exit status
and what it wrote on both streams. Bytes are in hexadecimal digits: they mean what the locale says.
Starting a process for each command takes seconds. Engines answer from threads, as in
`tests.measured_here`.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import traceback

import pytest

from prune_export.cli import main
from tests.measured_here import install


def streams() -> tuple[io.TextIOWrapper, io.TextIOWrapper]:
    """Standard output and error anew, encoded as Python's own are in this locale."""
    own = (sys.__stdout__, sys.__stderr__)
    assert own[0] and own[1]
    return tuple(
        io.TextIOWrapper(
            io.FileIO(number, "w", closefd=False),
            encoding=stream.encoding,
            errors=stream.errors,
            write_through=True,
        )
        for number, stream in zip((1, 2), own, strict=True)
    )  # type: ignore[return-value]


def ran(arguments: list[str]) -> tuple[int, bytes, bytes]:
    """The exit status of one command, and what it wrote."""
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = streams()
        sys.argv = ["prune-export", *arguments]
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            for number, was in zip((1, 2), kept, strict=True):
                os.dup2(was, number)
                os.close(was)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # type: ignore[assignment]
        written = []
        for file in (out, err):
            file.seek(0)
            written.append(file.read())
    return status, written[0], written[1]


if __name__ == "__main__":
    install(pytest.MonkeyPatch())
    for line in sys.stdin:
        status, out, err = ran(
            [os.fsdecode(bytes.fromhex(argument)) for argument in json.loads(line)]
        )
        print(json.dumps([status, out.hex(), err.hex()]), flush=True)
