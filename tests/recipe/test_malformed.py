"""Malformed recipes: each has its own error, with file and line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from prune_export.errors import RecipeError
from prune_export.recipe import Recipe


class Case(NamedTuple):
    """A recipe, where the error must point, what it must say, and what to do (part of each)."""

    text: str
    where: str
    problem: str
    fix: str = ""


GOOD = """\
recipe: 1
description: good
data:
  calibration: {files: [a.txt], samples: 8, length: 64}
  evaluation: {files: [b.txt], length: 64}
stages:
  - prune: {method: angular_distance, remove: 1}
export:
  - onnx: {precision: fp32}
verify:
  quality: {perplexity: evaluation}
  speed: {at_least: 1.1}
"""

CASES = {
    "empty": Case("", "bad.yaml", "empty", "recipe: 1"),
    "a list": Case("- 1\n- 2\n", "bad.yaml", "not a mapping"),
    "unclosed brace": Case("recipe: 1\nstages: [{\n", "bad.yaml:3", "not YAML", "indentation"),
    "tab": Case("recipe: 1\nstages:\n\t- prune: {}\n", "bad.yaml:3", "not YAML"),
    "tag": Case(
        "recipe: 1\nmodel: !!python/object:os.system x\n", "bad.yaml:2", "tag", "plain data"
    ),
    "local tag": Case("recipe: !include other.yaml\n", "bad.yaml:1", "tag `!include`"),
    "anchor": Case("recipe: 1\ndata: &d {}\n", "bad.yaml:2", "anchor or alias `d`"),
    "alias bomb": Case("a: &a [x]\nb: &b [*a, *a]\n", "bad.yaml:1", "anchor or alias `a`"),
    "merge key": Case("recipe: 1\ndata:\n  <<: {a: 1}\n", "bad.yaml:3", "not a word"),
    "twice": Case("recipe: 1\nmodel: a\nmodel: b\n", "bad.yaml:3  model", "written twice"),
    "two documents": Case("recipe: 1\n---\nrecipe: 1\n", "bad.yaml:2", "second document"),
    "deep": Case("recipe: " + "[" * 40 + "]" * 40, "bad.yaml:1", "nested deeper"),
    "many": Case("recipe: [" + "1," * 21_000 + "]", "bad.yaml:1", "values"),
    "control character": Case("recipe: \x07\n", "bad.yaml", "not YAML", "control"),
    "unknown section": Case("recipe: 1\nstage: []\n", "bad.yaml:2  stage", "not a key", "`stages`"),
    "no version": Case("description: x\n", "bad.yaml:1", "got None, expected 1"),
    "other version": Case("recipe: 2\n", "bad.yaml:1  recipe", "got 2, expected 1"),
    "nothing to do": Case("recipe: 1\n", "bad.yaml:1", "no stages and no exports"),
    "model not text": Case("recipe: 1\nmodel: [a]\n", "bad.yaml:2  model", "expected text"),
    "data that leaves the store": Case(
        "recipe: 1\ndata:\n  ../../x: {files: [a.txt]}\n",
        "bad.yaml:3",
        "got '../../x' as a name of data",
    ),
    "data without a usable name": Case(
        f"recipe: 1\ndata:\n  {'a' * 65}: {{files: [a.txt]}}\n", "bad.yaml:3", "as a name of data"
    ),
    "stages not a list": Case(
        "recipe: 1\nstages: {prune: {}}\n", "bad.yaml:2  stages", "expected a list", "`- `"
    ),
    "two keys in a stage": Case(
        "recipe: 1\nstages:\n  - prune: {}\n    heal: {}\n", "bad.yaml:3  stages.0", "one key"
    ),
    "unknown stage": Case(
        "recipe: 1\nstages:\n  - prnue: {method: x}\n", "bad.yaml:3", "`prnue`", "`prune`"
    ),
    "no method": Case("recipe: 1\nstages:\n  - prune: {remove: 1}\n", "bad.yaml:3", "no `method`"),
    "unknown method": Case(
        "recipe: 1\nstages:\n  - prune: {method: angular_distanse}\n",
        "bad.yaml:3  stages.0.prune.method",
        "angular_distanse",
        "`angular_distance`",
    ),
    "method that leaves the package": Case(
        "recipe: 1\nstages:\n  - prune: {method: ../run}\n", "bad.yaml:3", "`../run`"
    ),
    "unknown key of a method": Case(
        "recipe: 1\nstages:\n  - prune:\n      method: deepest\n      remov: 1\n",
        "bad.yaml:5  stages.0.prune.remov",
        "not a key of deepest",
        "`remove`",
    ),
    "a bare pattern": Case(
        "recipe: 1\nstages:\n  - prune: {method: wanda, nm: '2:4'}\n",
        "bad.yaml:3  stages.0.prune.nm",
        "got '2:4'",
        "write `{keep: 2, of: 4}`",
    ),
    "percent": Case(
        "recipe: 1\nstages:\n  - prune: {method: deepest, sparsity: 60}\n",
        "bad.yaml:3  stages.0.prune.sparsity",
        "got 60",
        "write `0.6`",
    ),
    "word for a number": Case(
        "recipe: 1\nstages:\n  - prune: {method: deepest, remove: six}\n",
        "bad.yaml:3  stages.0.prune.remove",
        "got 'six'",
    ),
    "negative": Case(
        "recipe: 1\nstages:\n  - prune: {method: deepest, remove: -1}\n", "bad.yaml:3", "got -1"
    ),
    "neither amount": Case(
        "recipe: 1\nstages:\n  - prune: {method: deepest}\n", "bad.yaml:3", "exactly one"
    ),
    "both amounts": Case(
        "recipe: 1\nstages:\n  - prune: {method: deepest, remove: 1, sparsity: 0.1}\n",
        "bad.yaml:3",
        "exactly one",
    ),
    "a word for a list": Case(
        GOOD.replace(
            "method: angular_distance, remove: 1", "method: wanda, sparsity: 0.5, include: down"
        ),
        "bad.yaml:7  stages.0.prune.include",
        "got 'down'",
        "write a list: `[down]`",
    ),
    "a role that is none": Case(
        "recipe: 1\nstages:\n  - prune:\n      method: wanda\n      sparsity: 0.5\n"
        "      include: [dwn]\n",
        "bad.yaml:6  stages.0.prune.include",
        "include: dwn: is not a role",
        "`down`",
    ),
    "a key that wants another": Case(
        "recipe: 1\nstages:\n  - prune:\n      method: wanda\n      sparsity: 0.5\n"
        "      permute: true\n",
        "bad.yaml:6  stages.0.prune.permute",
        "got true without `nm`",
    ),
    "a sparse method's neither amount": Case(
        "recipe: 1\nstages:\n  - prune: {method: wanda}\n",
        "bad.yaml:3  stages.0.prune",
        "how many weights: got neither `sparsity` nor `nm`",
    ),
    "an exporter's keys that exclude each other": Case(
        "recipe: 1\nexport:\n  - onnx:\n      precision: int8\n      sliding: true\n",
        "bad.yaml:5  export.0.onnx.sliding",
        "int8",
    ),
    "stage data not defined": Case(
        "recipe: 1\ndata: {calibration: {files: [a]}}\nstages:\n"
        "  - prune: {method: angular_distance, remove: 1, data: calibratoin}\n",
        "bad.yaml:4  stages.0.prune.data",
        "does not define",
        "`calibration`",
    ),
    "data of no kind": Case(
        "recipe: 1\ndata:\n  cal: {length: 3}\nstages: []\n", "bad.yaml:3  data.cal", "0 kinds"
    ),
    "data of two kinds": Case(
        "recipe: 1\ndata:\n  cal: {dataset: a, files: [b]}\n", "bad.yaml:3  data.cal", "2 kinds"
    ),
    "unknown key of data": Case(
        "recipe: 1\ndata:\n  cal:\n    files: [a]\n    lenght: 3\n",
        "bad.yaml:5  data.cal.lenght",
        "not a key",
        "`length`",
    ),
    "no files": Case("recipe: 1\ndata:\n  cal: {files: []}\n", "bad.yaml:3  data.cal.files", "got"),
    "zero samples": Case(
        "recipe: 1\ndata:\n  cal: {files: [a], samples: 0}\n", "data.cal.samples", "got 0"
    ),
    "unknown packing": Case(
        "recipe: 1\ndata:\n  cal: {files: [a], packing: steam}\n",
        "bad.yaml:3  data.cal.packing",
        "'steam'",
        "`stream`",
    ),
    "unknown exporter": Case(
        "recipe: 1\nexport:\n  - onx\n", "bad.yaml:3  export.0.onx", "`onx`", "`onnx`"
    ),
    "unknown precision": Case(
        "recipe: 1\nexport:\n  - onnx: {precision: fp12}\n",
        "bad.yaml:3  export.0.onnx.precision",
        "'fp12'",
        "`fp16`",
    ),
    "two exports to one place": Case(
        "recipe: 1\nexport:\n  - onnx\n  - onnx: {precision: fp16}\n", "bad.yaml:4", "both write"
    ),
    "unknown key of verify": Case(
        "recipe: 1\nexport: [onnx]\nverify: {qualty: {}}\n", "bad.yaml:3", "`qualty`", "`quality`"
    ),
    "perplexity of no data": Case(
        "recipe: 1\nexport: [onnx]\nverify: {quality: {perplexity: evaluation}}\n",
        "bad.yaml:3  verify.quality.perplexity",
        "does not define",
    ),
    "speed without engines": Case(
        "recipe: 1\nstages:\n  - prune: {method: deepest, remove: 1}\nverify: {speed: {}}\n",
        "bad.yaml:4  verify.speed",
        "exports none",
        "export",
    ),
    "empty workload": Case(
        "recipe: 1\nexport: [onnx]\nverify: {speed: {workloads: [{batch: 0}]}}\n",
        "bad.yaml:3  verify.speed.workloads.0.batch",
        "got 0",
    ),
    "unknown key of a workload": Case(
        "recipe: 1\nexport: [onnx]\nverify: {speed: {workloads: [{promt: 5}]}}\n",
        "bad.yaml:3  verify.speed.workloads.0.promt",
        "is not a key here",
        "prompt",
    ),
    "no workload but a number": Case(
        "recipe: 1\nexport: [onnx]\nverify: {speed: {workloads: [5]}}\n",
        "bad.yaml:3  verify.speed.workloads.0",
        "got 5",
    ),
    "extends nothing": Case("recipe: 1\nextends: no.yaml\n", "bad.yaml:2  extends", "neither"),
    "extends out of the directory": Case(
        "recipe: 1\nextends: ../../etc/passwd\n", "bad.yaml:2  extends", "leaves"
    ),
    "extends an absolute path": Case("recipe: 1\nextends: /etc/passwd\n", "bad.yaml:2", "leaves"),
    "extends itself": Case("recipe: 1\nextends: bad.yaml\n", "bad.yaml:2  extends", "circle"),
    "extends a list": Case("recipe: 1\nextends: [a]\n", "bad.yaml:2  extends", "one recipe"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_each_has_its_own_error(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(case.text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    assert case.where in caught.value.where
    assert case.problem in caught.value.problem
    assert case.fix in caught.value.fix
    assert list(tmp_path.iterdir()) == [file]


def test_the_good_one_loads(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD, encoding="utf-8")
    recipe = Recipe.load(file)
    assert recipe.stages[0].entry.remove == 1
    assert recipe.data["evaluation"].packing == "stream"
    assert recipe.data["calibration"].packing == "packed"


def test_circles_of_several_files_are_found(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"recipe: 1\nextends: {other}.yaml\n")
    with pytest.raises(RecipeError, match=r"a\.yaml → b\.yaml → c\.yaml → a\.yaml"):
        Recipe.load(tmp_path / "a.yaml")


def test_large_and_binary_files_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(RecipeError, match="expected at most"):
        Recipe.load(large)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\x80\x03}q\x00.")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.load(binary)


def test_unknown_names_and_addresses(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean `demo`"):
        Recipe.load("dem")
    with pytest.raises(RecipeError, match="not a recipe address"):
        Recipe.load("hf://../../etc")
    with pytest.raises(RecipeError, match="cache"):
        Recipe.load("hf://some-owner/some-model")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a\x1b[2J", "a\nb", "x" * 65, "-rf"])
def test_a_name_of_data_is_a_word_as_files_are_called_by_it(name: str) -> None:
    data = json.dumps({name: {"files": ["a.txt"], "length": 32}})
    with pytest.raises(RecipeError, match="as a name of data"):
        Recipe.parse(
            f"recipe: 1\ndata: {data}\nstages: [{{prune: {{method: deepest, remove: 1}}}}]\n"
        )
