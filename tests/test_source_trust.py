"""No call of this package lets a model's own code run, or picks an adapter up beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import prune_export

ROOT = Path(prune_export.__file__).parent
LOADERS = ("from_pretrained", "from_config")
PASSED_ON = {
    # The stand-in of a model class hands on what transformers' automatic class gave it.
    ("modeling/__init__.py", "cls._own().from_pretrained"),
    # Code is run in the reload check where it is, byte for byte, our own.
    ("verify/reload_child.py", "AutoConfig.from_pretrained"),
    ("verify/reload_child.py", "own.from_pretrained"),
}
WRAPPED = {("exporters/ort_genai/build.py", "AutoModelForCausalLM.from_pretrained")}
"""Taken as a value, to be called with the same arguments; its own test is in test_loading."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(ROOT.rglob("*.py")):
        yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def loads(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Calls of transformers' loaders; `Arch.from_config` and the like are other things."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if node.func.attr in LOADERS and not name.startswith("Arch."):
                yield name, node


def test_every_load_says_that_no_code_is_trusted() -> None:
    found, bad = 0, []
    for file, tree in trees():
        for name, call in loads(tree):
            if (file, name) in PASSED_ON:
                continue
            found += 1
            said = keywords(call).get("trust_remote_code")
            if not isinstance(said, ast.Constant) or said.value is not False:
                bad.append(f"{file}:{call.lineno} {name}")
    assert not bad, "give trust_remote_code=False, or use prune_export.checkpoint.loading"
    assert found >= 6


def test_every_load_of_weights_says_that_no_adapter_is_picked_up() -> None:
    bad = []
    for file, tree in trees():
        for name, call in loads(tree):
            model = name.startswith("AutoModel") and name.endswith(".from_pretrained")
            if model and "adapter_kwargs" not in keywords(call):
                bad.append(f"{file}:{call.lineno} {name}")
    assert not bad, "use prune_export.checkpoint.loading.load_model"


def test_no_loader_is_handed_on_without_its_arguments() -> None:
    for file, tree in trees():
        called = {id(call.func) for _, call in loads(tree)}
        for node in ast.walk(tree):
            loader = isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
            if loader and id(node) not in called:
                assert (file, ast.unparse(node)) in WRAPPED, f"{file}:{node.lineno}"


def test_nothing_trusts_or_unpickles() -> None:
    for file, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            said = keywords(node)
            trusted = said.get("trust_remote_code")
            assert not (isinstance(trusted, ast.Constant) and trusted.value), (
                f"{file}:{node.lineno}"
            )
            name = ast.unparse(node.func)
            if name in ("torch.load", "np.load", "numpy.load"):
                flag = said.get("weights_only" if name == "torch.load" else "allow_pickle")
                assert isinstance(flag, ast.Constant), f"{file}:{node.lineno}"
                assert flag.value is (name == "torch.load"), f"{file}:{node.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
                                "eval", "exec", "joblib.load"), f"{file}:{node.lineno}"  # fmt: skip
