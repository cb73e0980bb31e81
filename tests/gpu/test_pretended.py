"""The tests that need a CUDA device, on one that is pretended: all tensors where they belong.

It shows that methods, statistics and healers keep their tensors on one device and give what they
give on the CPU. It shows nothing of kernels, streams and memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loads Linux libraries"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths

    made = tmp_path_factory.mktemp("pretended") / "device.so"
    includes = [f"-I{path}" for path in include_paths()]
    found = [f"-L{path}" for path in library_paths()]
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(HERE / "pretended/device.cpp")]
    subprocess.run(
        [*command, "-o", str(made), *includes, *found, "-lc10", "-ltorch_cpu"], check=True
    )
    return made


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = HERE.parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(HERE / "pretended"), str(library), "-q", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def test_what_needs_a_gpu_passes_on_a_pretended_one(library: Path) -> None:
    done = run(library, "tests/gpu/test_methods.py", "tests/gpu/test_cuda.py", "-k", "not qlora")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(library: Path, tmp_path: Path) -> None:
    """Else the test above could not fail."""
    file = tmp_path / "test_mixed.py"
    file.write_text(
        "import torch\n"
        "def test_mixed() -> None:\n"
        "    there = torch.ones(3).to('cuda')\n"
        "    assert (there + there).device.type == 'cuda'\n"
        "    there + torch.ones(3)\n",
        encoding="utf-8",
    )
    done = run(library, str(file))
    assert done.returncode == 1
    assert "found at least two devices" in done.stdout
