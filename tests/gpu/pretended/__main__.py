"""pytest on a machine that has a pretended CUDA device.

python tests/gpu/pretended LIBRARY ARGUMENTS_OF_PYTEST    LIBRARY is `device.cpp`, compiled
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def load(library: str) -> None:
    """Loads the device, and before it what it is linked against; torch itself comes after."""
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "lib"
    for file in (
        *sorted(folder.glob("libgomp*")),
        folder / "libc10.so",
        folder / "libtorch_cpu.so",
    ):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


if __name__ == "__main__":
    load(sys.argv[1])
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the device is known in one thread only
    # These would look for their own CUDA code.
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import pytest
    from on_cpu import pretended

    with pretended():
        sys.exit(pytest.main(sys.argv[2:]))
