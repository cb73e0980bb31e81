"""docs/your-own.md, run as written: plug-ins in a package of their own, found by entry points."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import prune_export
from prune_export import Machine, Options, Recipe, plan, plugins, registry, run
from prune_export.arch import table
from prune_export.checkpoint import Checkpoint
from prune_export.cli.listing import methods
from prune_export.deriving.instances import random_instance
from prune_export.deriving.making import prove_table
from prune_export.errors import PlanError, StageError
from tests.contracts import test_methods as contracts
from tests.contracts.made import plain_view

pytestmark = pytest.mark.usefixtures("measured_here")

TEXT = (Path(__file__).parents[2] / "docs" / "your-own.md").read_text(encoding="utf-8")
FAMILIES = dict(re.findall(r"<!-- example:begin (\S+) -->\n```yaml\n(.*?)```", TEXT, re.S))
EXAMPLES = dict(re.findall(r"<!-- example:begin (\S+) -->\n```python\n(.*?)```", TEXT, re.S))
DATA = "data:\n  calibration: {files: [calibration.txt], samples: 4, length: 32}\n"
QUIET = "verify: {parity: false, generation: false}\n"


def install(site: Path, package: str, files: dict[str, str], entries: dict[str, Any]) -> None:
    """What an installer leaves in a site directory: the package, and what it says of itself."""
    (site / package).mkdir(parents=True)
    for name, code in {"__init__.py": "", **files}.items():
        (site / package / name).write_text(code, encoding="utf-8")
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [
        line
        for group, own in entries.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in own.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def forget() -> None:
    for cached in (registry.names, registry.find, registry._plugins):
        cached.cache_clear()
    table._tables.cache_clear()


@contextmanager
def on_path(site: Path, package: str) -> Iterator[Path]:
    """The site directory on the path of this process and of those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site))
        forget()
        try:
            yield site
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
    importlib.invalidate_caches()
    forget()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    site = tmp_path_factory.mktemp("site")
    toml = re.search(r"```toml\n(.*?)```", TEXT, re.S)
    assert toml is not None
    entries = tomllib.loads(toml[1])["project"]["entry-points"]
    install(site, "my_package", {**EXAMPLES, **FAMILIES}, entries)
    with on_path(site, "my_package"):
        yield site


def made(
    stages: str, more: str, model: Path, corpus: Path, folder: Path
) -> tuple[dict[str, Any], Any]:
    """The report and the result of a recipe that is first planned; shapes are as predicted."""
    recipe = Recipe.parse(f"recipe: 1\n{DATA}stages: [{{prune: {stages}}}]\n{more}", root=corpus)
    machine = Machine.detect(device="cpu", threads=1)
    options = Options(folder / "out", folder / "store", machine)
    planned = plan(recipe, str(model), options)
    result = run(recipe, str(model), options)
    after = Checkpoint.open(result.out)
    predicted = planned.archs[-1]
    assert {tensor.name: predicted.shape(tensor) for tensor in predicted.stored()} == {
        name: entry.shape for name, entry in after.entries.items()
    }
    return json.loads((result.out / "report.json").read_text()), result


def test_the_family(installed: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    own = table.table_for("nanochat")
    assert own == table.parse_table(FAMILIES["nanochat.yaml"], "docs/your-own.md")
    checks, _ = prove_table(own)
    assert {one.what: one.word for one in checks if not one.ok} == {"heads": "refused"}
    config = {"model_type": "nanochat", **own.tiny.config, "vocab_size": 258}
    model = random_instance(config, tmp_path / "model").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, model / name)
    report, result = made("{method: angular_distance, remove: 2}", QUIET, model, corpus, tmp_path)
    assert report["result"]["layers"] == 4
    assert report["notes"] == [] or "derived" not in report["notes"][0]
    assert result.verification.reload.ok


def test_examples_import_what_is_public_and_nothing_else() -> None:
    assert len(EXAMPLES) == 4
    for name, code in EXAMPLES.items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prune_export"):
                assert node.module == "prune_export.plugins", name
                assert {own.name for own in node.names} <= set(plugins.__all__), name


def test_what_plugins_offers_is_there_and_explained() -> None:
    assert list(plugins.__all__) == sorted(plugins.__all__)
    for name in plugins.__all__:
        own = getattr(plugins, name)
        if isinstance(own, type) and own.__module__.startswith("prune_export"):
            assert (own.__doc__ or "").strip(), name
    assert prune_export.plugins is plugins


def test_the_depth_method(installed: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    stage = "{method: odd_influence, remove: 1}"
    report, _ = made(stage, QUIET, tiny_llama, corpus, tmp_path)
    assert report["result"]["layers"] == 5
    assert report["stages"][0]["log"]["dropped"][0] % 2 == 1


def test_the_sparse_method(installed: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    stage = "{method: power_wanda, nm: {keep: 2, of: 4}, exclude: [q]}"
    report, _ = made(stage, QUIET, tiny_llama, corpus, tmp_path)
    log = report["stages"][0]["log"]
    assert (log["pattern"], log["sparsity"]) == ("2 of 4", 0.5)
    assert not any("q_proj" in name for name in log["tensors"])


def test_the_sparse_method_at_power_1_is_wanda(
    installed: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    digests = set()
    for name, keys in (("power_wanda", {"power": 1.0}), ("wanda", {})):
        method = registry.find("methods", name)(sparsity=0.5, **keys)
        decision = method.decide(plain_view(Checkpoint.open(tiny_llama), tmp_path / name))
        digests.add(decision.log["mask_digest"])
    assert len(digests) == 1


def test_the_width_method(installed: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    stage = "{method: fluctuation, ffn: 0.5, kv_groups: 0.5, multiple_of: 8}"
    report, result = made(stage, QUIET, tiny_llama, corpus, tmp_path)
    config = json.loads((result.out / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (32, 1)
    assert len(report["stages"][0]["log"]["removed"]["mlp.0"]) == 32


@pytest.mark.slow
def test_the_exporter_is_opened_and_equals_pytorch(
    installed: Path, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    evaluation = "  evaluation: {files: [evaluation.txt], samples: 2, length: 64}\n"
    text = (
        f"recipe: 1\n{DATA}{evaluation}"
        "stages: [{prune: {method: odd_influence, remove: 3}}]\n"
        "export: [program]\n"
        "verify: {generation: false}\n"
    )
    machine = Machine.detect(device="cpu", threads=1)
    options = Options(tmp_path / "out", tmp_path / "store", machine)
    result = run(Recipe.parse(text, root=corpus), str(tiny_llama), options)
    assert (result.out / "program" / "model.pt2").is_file()
    (parity,) = result.verification.parity
    assert parity.engine == "program"
    assert parity.ok
    assert parity.greedy_total > 0
    assert not result.failed


@pytest.mark.parametrize("name", ["odd_influence", "power_wanda", "fluctuation"])
def test_the_contracts_of_ours_hold_for_them(
    name: str, installed: Path, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Installed beside a checkout they are found by these tests unasked, as the page says."""
    contracts.test_an_entry_is_a_frozen_dataclass_that_explains_itself("methods", name)
    for family in ("gemma2", "mixtral"):
        folder = tmp_path / family
        contracts.test_a_method_leaves_what_it_predicted_and_it_reloads(
            name, None, family, tiny, folder
        )


def test_the_command_that_the_page_names_lists_them(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "`prune-export methods` shows them" in TEXT
    methods(json=True)
    said = capsys.readouterr().out
    for name in ("odd_influence", "power_wanda", "fluctuation", "program"):
        assert name in said


def test_the_contract_of_entries_holds_for_the_exporter(installed: Path) -> None:
    contracts.test_an_entry_is_a_frozen_dataclass_that_explains_itself("exporters", "program")


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise RuntimeError('lacks a library')", "cannot be imported: RuntimeError: lacks"),
        ("Own = 3", "of broken_package is no frozen dataclass"),
        ("class Own:\n    VERSION = '1'", "of broken_package is no frozen dataclass"),
    ],
)
def test_a_broken_plug_in_is_named(code: str, fault: str, tmp_path: Path) -> None:
    entries = {"prune_export.methods": {"broken": "broken_package.own:Own"}}
    install(tmp_path, "broken_package", {"own.py": code}, entries)
    with on_path(tmp_path, "broken_package"):
        assert "broken" in registry.names("methods")
        with pytest.raises(PlanError, match=fault):
            registry.find("methods", "broken")


def test_a_name_that_two_bring_is_refused(tmp_path: Path) -> None:
    for package, name in (("one_package", "twice"), ("other_package", "wanda")):
        entries = {"prune_export.methods": {"twice": f"{package}.own:Own", name: "x:Y"}}
        install(tmp_path, package, {}, entries)
    with on_path(tmp_path, "one_package"):
        with pytest.raises(PlanError, match=r"of one_package .* and of other_package"):
            registry.find("methods", "twice")
        with pytest.raises(PlanError, match="of prune_export itself and of other_package"):
            registry.find("methods", "wanda")
        assert registry.find("methods", "ria").__name__ == "Ria"


@dataclass(frozen=True)
class Faulty(plugins.WidthMethod):
    VERSION: ClassVar[str] = "1"


class Ones:
    """A scorer that gives three scores, of whatever it scores."""

    def watch(self, site: Any, units: int, width: int, device: str) -> plugins.InputNorms:
        return plugins.InputNorms(width, device)

    def score(self, site: Any, weights: Any, units: int, seen: Any) -> torch.Tensor:
        return torch.ones(3)


class NotNumbers(Ones):
    def score(self, site: Any, weights: Any, units: int, seen: Any) -> torch.Tensor:
        return torch.full((units,), float("nan"))


class Misshapen(Faulty):
    scorer = Ones()


class Missing(Faulty):
    scorer = NotNumbers()


class Undefined(Faulty):
    scorer = "mine"


@pytest.mark.parametrize("compensate", [False, "auto"])
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Faulty, "defines no `scorer`"),
        (Undefined, "gives as `scorer` a str without such methods"),
        (Misshapen, r"got scores \[3\], 0 of them NaN, expected \[64\]"),
        (Missing, r"got scores \[64\], 64 of them NaN"),
    ],
)
def test_a_width_method_without_proper_scores_is_told(
    kind: Any, fault: str, compensate: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    method = kind(ffn=0.5, multiple_of=8, compensate=compensate)
    with pytest.raises((PlanError, StageError), match=fault):
        method.decide(plain_view(Checkpoint.open(tiny_llama), tmp_path))


@pytest.mark.parametrize(
    "score", [lambda weight, seen, tensor: seen.sums, lambda weight, seen, tensor: weight.square_()]
)
def test_a_sparse_score_is_of_each_weight_and_leaves_the_matrix(
    score: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    method = registry.find("methods", "wanda")(sparsity=0.5)
    with pytest.raises(StageError, match="one of each weight, and the matrix as it was"):
        plugins.zero_least(method, plain_view(Checkpoint.open(tiny_llama), tmp_path), score)


@pytest.mark.slow
def test_an_engine_says_by_whose_name_it_is_opened(tmp_path: Path, tiny_llama: Path) -> None:
    code = EXAMPLES["program.py"].replace('exporter="program"', 'exporter="other"')
    entries = {"prune_export.exporters": {"misnamed": "misnamed_package.own:Program"}}
    install(tmp_path / "site", "misnamed_package", {"own.py": code}, entries)
    stages = "stages: [{prune: {method: deepest, remove: 5}}]\nexport: [misnamed]\n"
    machine = Machine.detect(device="cpu", threads=1)
    options = Options(tmp_path / "out", tmp_path / "store", machine)
    with on_path(tmp_path / "site", "misnamed_package"):
        recipe = Recipe.parse(f"recipe: 1\n{stages}{QUIET}")
        with pytest.raises(StageError, match="its record says that `other` made it"):
            run(recipe, str(tiny_llama), options)
