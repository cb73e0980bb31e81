"""What is released: the built wheel, in an environment that does not have the sources."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import prune_export

ROOT = Path(__file__).parents[1]

USER = """\
from pathlib import Path
from prune_export import Machine, Options, Recipe, plan

options = Options(out=Path("out"), store=Path("store"), machine=Machine.detect())
reveal_type(plan(Recipe.load("recipe.yaml"), None, options).peak_ram_bytes)
Options(out=1)
"""


def test_the_release_is_named_alike_everywhere() -> None:
    heading = re.search(r"^## (\d\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert heading is not None
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert heading[1] == prune_export.__version__ == cited["version"]
    assert heading[2] == str(cited["date-released"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is unpacked in, as pip does it for a pure package."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


def run_in(installed: Path, *code: str) -> str:
    """What a fresh interpreter says that has the wheel before everything else."""
    done = subprocess.run(
        [sys.executable, *code],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_has_types_recipes_tables_and_nothing_of_the_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    assert "prune_export/py.typed" in names
    recipes = {file.name for file in (ROOT / "recipes").glob("*.yaml")}
    assert {f"prune_export/_recipes/{name}" for name in recipes} <= names
    assert "prune_export/arch/families/llama.yaml" in names
    kernels = (ROOT / "prune_export" / "kernels").iterdir()
    sources = {
        f"prune_export/kernels/{one.name}" for one in kernels if one.suffix in (".cpp", ".h")
    }
    assert len(sources) >= 8
    assert sources <= names
    assert {name.partition("/")[0] for name in names} == {
        "prune_export",
        "prune_export_llama_cpp",
        "prune_export_lm_eval",
        "prune_export_server",
        "prune_export_triton",
        f"prune_export-{prune_export.__version__}.dist-info",
    }


@pytest.mark.slow
def test_the_wheel_runs_and_has_the_public_names(installed: Path) -> None:
    asked = "import prune_export, sys; sys.stdout.write(prune_export.__file__)"
    assert run_in(installed, "-c", asked).startswith(str(installed))
    said = run_in(installed, "-m", "prune_export", "--version")
    assert said.split()[-1] == prune_export.__version__
    names = "from prune_export import Machine, Options, Recipe, load, plan, run; print(plan, run)"
    assert run_in(installed, "-c", names).startswith("<function plan")
    recipe = "from prune_export import Recipe; print(Recipe.load('wanda-50').stages[0].name)"
    assert "wanda" in run_in(installed, "-c", recipe)


@pytest.mark.slow
def test_mypy_sees_the_types_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    # Without the types of torch and the like, which take mypy half a minute to read.
    others = ("torch", "transformers", "numpy", "matplotlib", "safetensors", "pydantic", "onnx")
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in others)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}", encoding="utf-8")
    settings = (f"--config-file={tmp_path / 'mypy.ini'}", f"--cache-dir={tmp_path / 'cache'}")
    said = run_in(installed, "-m", "mypy", *settings, str(tmp_path / "user.py"))
    assert 'Revealed type is "int"' in said or 'Revealed type is "builtins.int"' in said, said
    assert 'Argument "out" to "Options" has incompatible type "int"; expected "Path"' in said
    assert "missing library stubs or py.typed" not in said
