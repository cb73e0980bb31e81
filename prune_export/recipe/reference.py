"""Makes the reference of recipes from the classes that check them: Markdown and JSON Schema."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from prune_export import registry
from prune_export.recipe.grid import Grid
from prune_export.recipe.iterate import BY_ROUND, Iterate
from prune_export.recipe.schema import VERSION, Publish, Verify
from prune_export.recipe.search import Search, Target
from prune_export.recipe.sources import SOURCES


@dataclass(frozen=True)
class KeyText:
    """A recipe key, as the reference shows it."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class EntryText:
    """A method, healer or exporter as the reference shows it: summary, whole text, and keys."""

    kind: str
    name: str
    summary: str
    text: str
    keys: tuple[KeyText, ...]


def described(kind: registry.Kind, name: str) -> EntryText:
    """Describes a registered method, healer or exporter from its class.

    Raises:
        PlanError: nothing is registered under the name.
    """
    cls = registry.find(kind, name)
    text = inspect.cleandoc(cls.__doc__ or "")
    properties = _schema_of(cls).get("properties", {})
    keys = tuple(
        KeyText(
            field.name,
            _type_text(properties.get(field.name, {})),
            _default_text(field),
            str(properties.get(field.name, {}).get("description", "")),
        )
        for field in dataclasses.fields(cls)
    )
    return EntryText(kind, name, text.split("\n\n")[0].replace("\n", " "), text, keys)


def json_schema() -> dict[str, Any]:
    """Makes a JSON Schema (2020-12) of recipes, with every registered entry."""
    definitions: dict[str, Any] = {}

    def stage(kind: str, group: registry.Kind) -> dict[str, Any]:
        options = []
        for name in registry.names(group):
            body = _lifted(_schema_of(registry.find(group, name)), definitions)
            body["properties"] = {
                "method": {"const": name, "description": described(group, name).summary},
                "data": {"type": "string", "description": "Name of a `data` source."},
            } | body.get("properties", {})
            body["required"] = ["method", *body.get("required", [])]
            options.append(body | {"additionalProperties": False})
        return _single_key(kind, {"oneOf": options})

    exporters = []
    for name in registry.names("exporters"):
        body = _lifted(_schema_of(registry.find("exporters", name)), definitions)
        exporters.append(
            _single_key(name, {"anyOf": [body | {"additionalProperties": False}, {"type": "null"}]})
        )
    source = {"oneOf": [_lifted(cls.model_json_schema(), definitions) for cls in SOURCES.values()]}
    nullable_text = {"type": ["string", "null"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "prune_export recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["recipe"],
        "properties": {
            "recipe": {"const": VERSION, "description": "Version of the schema."},
            "description": nullable_text | {"description": "One sentence: what it does."},
            "extends": {"type": "string", "description": "A recipe that this one is laid over."},
            "model": nullable_text | {"description": "Hub id, directory or .gguf file."},
            "data": {"type": "object", "additionalProperties": source},
            "stages": {
                "type": "array",
                "items": {
                    "oneOf": [
                        stage("prune", "methods"),
                        stage("quantize", "quantize"),
                        stage("heal", "heal"),
                        _search(definitions),
                        _iterate(stage("prune", "methods"), stage("heal", "heal")),
                    ]
                },
            },
            "export": {
                "type": "array",
                "items": {"oneOf": [{"enum": list(registry.names("exporters"))}, *exporters]},
            },
            "verify": _lifted(Verify.model_json_schema(), definitions),
            "publish": _lifted(Publish.model_json_schema(), definitions),
        },
        "$defs": definitions,
    }


def _search(definitions: dict[str, Any]) -> dict[str, Any]:
    body = _lifted(_schema_of(Search), definitions)
    # A candidate of one stage may be written without its list.
    listed = body["properties"]["candidates"]
    listed["items"] = {"anyOf": [listed["items"], {"type": "object"}]}
    return _single_key("search", body | {"additionalProperties": False})


def _iterate(*kinds: dict[str, Any]) -> dict[str, Any]:
    """The schema of rounds: their stages are as others, and some keys may list values."""
    for kind in kinds:
        ((name, body),) = kind["properties"].items()
        for option in body["oneOf"]:
            for key in BY_ROUND[name]:
                if key in option["properties"]:
                    one = option["properties"][key]
                    listed = {"type": "array", "items": one}
                    option["properties"][key] = {"anyOf": [one, listed]}
    body = _schema_of(Iterate)
    body["properties"]["stages"]["items"] = {"oneOf": list(kinds)}
    return _single_key("iterate", body | {"additionalProperties": False})


def markdown() -> str:
    """Writes the reference as Markdown: docs/recipes.md is this text."""
    lines = ["# Recipe reference", "", "Generated from the schema by `make docs`; do not edit.", ""]
    lines += ["## Sections", "", "| key | meaning |", "|---|---|"]
    for key, body in json_schema()["properties"].items():
        lines.append(f"| `{key}` | {body.get('description') or _SECTIONS[key]} |")
    inner: dict[str, Any] = {}
    for title, group in (
        ("stages: prune", "methods"),
        ("stages: quantize", "quantize"),
        ("stages: heal", "heal"),
        ("export", "exporters"),
    ):
        for name in registry.names(group):  # type: ignore[arg-type]
            entry = described(group, name)  # type: ignore[arg-type]
            lines += ["", f"## {title}: `{name}`", "", entry.text, ""]
            lines += _key_table(entry.keys)
            if group == "heal":
                inner |= _schema_of(registry.find("heal", name)).get("$defs", {})
    for name, body in sorted(inner.items()):
        lines += ["", f"### heal: {name.lower()}", "", body.get("description", ""), ""]
        lines += _key_table(_property_keys(body))
    lines += ["", "## stages: `iterate`", "", inspect.cleandoc(Iterate.__doc__ or ""), ""]
    lines += _key_table(_property_keys(_schema_of(Iterate)))
    lines += ["", "## stages: `search`", "", inspect.cleandoc(Search.__doc__ or ""), ""]
    lines += _key_table(_property_keys(_schema_of(Search)))
    lines += ["", "### search: target", "", *_key_table(_model_keys(Target))]
    lines += ["", "### search: grid", "", inspect.cleandoc(Grid.__doc__ or ""), ""]
    lines += _key_table(_model_keys(Grid))
    for title, cls in SOURCES.items():
        lines += ["", f"## data: `{title}`", "", inspect.cleandoc(cls.__doc__ or ""), ""]
        lines += _key_table(_model_keys(cls))
        for name, definition in cls.model_json_schema().get("$defs", {}).items():
            lines += ["", f"### {title}: {name.lower()}", "", definition.get("description", ""), ""]
            lines += _key_table(_property_keys(definition))
    for title, model in (("verify", Verify), ("publish", Publish)):
        lines += ["", f"## {title}", ""]
        lines += _key_table(_model_keys(model))
        for name, definition in model.model_json_schema().get("$defs", {}).items():
            lines += ["", f"### {title}: {name.lower()}", "", definition.get("description", ""), ""]
            lines += _key_table(_property_keys(definition))
    return "\n".join(lines) + "\n"


_SECTIONS = {
    "data": "Named sources: a Hub dataset, local files, saved token ids, or what a model says.",
    "stages": "What is done, in order: `prune`, `quantize`, `heal`, `search`, `iterate`.",
    "export": "Engines that are made of the last checkpoint.",
    "verify": "What is measured, and what must hold.",
    "publish": "Where the result may go; nothing is uploaded unless the command line asks for it.",
}


def _schema_of(cls: type) -> dict[str, Any]:
    schema: dict[str, Any] = TypeAdapter(cls).json_schema()
    return schema


def _lifted(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Moves a schema's own `$defs` to the recipe's."""
    schema = dict(schema)
    definitions |= schema.pop("$defs", {})
    return schema


def _single_key(key: str, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [key],
        "properties": {key: body},
    }


def _type_text(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type_text(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1]).lower()
    if schema.get("type") == "array":
        return f"list of {_type_text(schema.get('items', {}))}"
    text = str(schema.get("type", "any"))
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    return f"{text} {', '.join(limits)}".strip()


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _value_text(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _value_text(field.default_factory())
    return "required"


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _model_keys(cls: Any) -> tuple[KeyText, ...]:
    return _property_keys(cls.model_json_schema())


def _property_keys(schema: dict[str, Any]) -> tuple[KeyText, ...]:
    return tuple(
        KeyText(
            name,
            _type_text(body),
            _value_text(body["default"])
            if "default" in body and not isinstance(body["default"], dict | list)
            else ("required" if name in schema.get("required", ()) else ""),
            str(body.get("description", "")),
        )
        for name, body in schema.get("properties", {}).items()
    )


def _key_table(keys: tuple[KeyText, ...]) -> list[str]:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.name}`", key.type, key.default, key.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


if __name__ == "__main__":
    print(markdown(), end="")
