from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from transformers.activations import ACT2FN

from prune_export.arch.conditions import holds, keys_of, value
from prune_export.arch.table import ConfigRules, common, parse_table, table_for, tables
from prune_export.errors import UnsupportedArch

LLAMA = files("prune_export.arch").joinpath("families/llama.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a", 12),
        ("a / b", 4),
        ("2 * a", 24),
        ("a * b / 4", 9),
        ("missing | a", 12),
        ("nothing | b", 3),
        ("missing / b | a / b", 4),
        ("missing | 1", 1),
    ],
)
def test_value(expression: str, expected: int) -> None:
    assert value(expression, {"a": 12, "b": 3, "nothing": None}) == expected


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (None, True),
        ("yes", True),
        ("no", False),
        ("missing", False),
        ("not no", True),
        ("not missing", True),
        ("act == gelu", True),
        ("act != gelu", False),
        ("a == 12", True),
        ("a == same", True),
        ("a != b", True),
        ("yes and not no and act == gelu", True),
        ("yes and no", False),
    ],
)
def test_holds(condition: str | None, expected: bool) -> None:
    config = {"yes": True, "no": False, "act": "gelu", "a": 12, "same": 12, "b": 3}
    assert holds(condition, config) is expected


@pytest.mark.parametrize("condition", ["a or b", "not a == 3", "a ==", "== 3", "a < 3", ""])
def test_what_is_no_condition_is_refused(condition: str) -> None:
    with pytest.raises(ValueError, match="is not a condition"):
        holds(condition, {"a": 1})


def test_keys_of() -> None:
    assert keys_of("a and not b and c == gelu") == {"a", "b", "c"}
    assert keys_of("head_dim | hidden_size / 2") == {"head_dim", "hidden_size"}


MALFORMED = [
    ("vocab residual}", "vocab residaul}", r"embed_tokens\.weight: .*unknown axes \['residaul'\]"),
    ("vocab residual}", "vocab (residual}", "expected an axis"),
    ("when: mlp_bias", "when: mpl_bias", r"condition on unknown keys \['mpl_bias'\]"),
    ("tied_to: model.embed_tokens.weight", "tied_to: x", "tied to x, which is no row"),
    ("role: gate,", "role: gate, layers: sparse,", "unknown layer set 'sparse'"),
    ("blocks: model.layers", "block_list: model.layers", r"families/x\.yaml  block"),
    ("head_dim: dim}", "head_dim: dims}", r"writes\.head_dim: unknown axes \['dims'\]"),
    ("family: llama", "family: [", "is not YAML"),
]


@pytest.mark.parametrize(("old", "new", "message"), MALFORMED)
def test_a_malformed_table_is_named(old: str, new: str, message: str) -> None:
    assert old in LLAMA
    with pytest.raises(UnsupportedArch, match=message) as caught:
        parse_table(LLAMA.replace(old, new, 1), "families/x.yaml")
    assert caught.value.where.startswith("families/x.yaml")


def test_a_table_is_data_only() -> None:
    with pytest.raises(UnsupportedArch, match="is not YAML"):
        parse_table(
            LLAMA.replace("family: llama", "family: !!python/object/apply:os.getcwd []"),
            "families/x.yaml",
        )


def test_each_file_is_found_and_says_where_it_is_from() -> None:
    folder = files("prune_export.arch").joinpath("families")
    stems = {entry.name[:-5] for entry in folder.iterdir() if not entry.name.startswith("_")}
    assert {table.family for table in tables().values()} == stems
    for name, table in tables().items():
        assert name in table.model_types
        assert table.source
        assert table_for(name) is table


def test_no_key_is_both_common_and_a_family_s_own() -> None:
    for table in tables().values():
        assert not table.keys() & common().keys(), table.family


def test_activations_of_the_tables_exist() -> None:
    for table in tables().values():
        for key in ("hidden_act", "hidden_activation", "activation_function"):
            for name in table.config.accepts.get(key, []):
                assert name is None or name in ACT2FN


def test_common_keys_are_sorted_into_one_list_only() -> None:
    text = files("prune_export.arch").joinpath("families/_common.yaml").read_text(encoding="utf-8")
    lists = yaml.safe_load(text)
    assert len(common().keys()) == sum(len(keys) for keys in lists.values())


def test_the_documentation_names_every_family_and_every_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    assert ", ".join(sorted({t.family for t in tables().values()})) == (
        text.split("Known: ")[1].split(".")[0].replace("\n", " ").replace(" (text)", "")
    )
    for rule in ConfigRules.model_fields:
        assert f"`{rule}`" in text
    example = text.split("```yaml\n")[1].split("```")[0]
    assert all(line in LLAMA for line in example.splitlines())
