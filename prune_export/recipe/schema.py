"""Checks a recipe's sections, key by key, against the registered methods and exporters.

A stage or an exporter is checked against the dataclass of its name, so a new method's keys are
known here without an edit, and the JSON Schema for editors is made from the same classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from prune_export import registry
from prune_export.errors import PlanError, RecipeError, did_you_mean
from prune_export.recipe.document import Document, Path_
from prune_export.recipe.engines import QUANTIZE, Export
from prune_export.recipe.grid import TO_TARGET
from prune_export.recipe.iterate import Iterate, rounded, written_out
from prune_export.recipe.refusals import translated
from prune_export.recipe.search import Search, marks
from prune_export.recipe.sources import SOURCES, Frozen, Source
from prune_export.recipe.stages import Stage, Sweep, Workload, checker

VERSION = 1

_REGISTRY: Mapping[str, registry.Kind] = {
    "prune": "methods",
    "quantize": "quantize",
    "heal": "heal",
}
_NAME = re.compile(r"[^\W_][\w .+-]{0,63}")
"""Of a data source; an artifact's directory is called by it."""

_DEFAULT_DATA = {"prune": "calibration", "quantize": "calibration", "heal": "healing"}

M = TypeVar("M", bound=BaseModel)


class Quality(Frozen):
    """What quality is measured on."""

    perplexity: Annotated[str | None, Field(description="Name of a `data` source.")] = None
    at_most: Annotated[
        float | None,
        Field(gt=0, description="Gate: perplexity may be at most this many times the dense one."),
    ] = None
    tasks: Annotated[tuple[str, ...], Field(description="lm-eval tasks.")] = ()
    task_samples: Annotated[int | None, Field(gt=0, description="Samples of each task.")] = None
    engines: Annotated[
        bool, Field(description="Measure each engine as well: perplexity and tasks.")
    ] = True


class Speed(Frozen):
    """What speed is measured on."""

    workloads: Annotated[tuple[Workload, ...], Field(min_length=1, description="Requests.")] = (
        Workload(),
    )
    at_least: Annotated[
        float | None, Field(gt=0, description="Gate: the speedup must be at least this.")
    ] = None
    phase: Annotated[
        Literal["prefill", "decode"], Field(description="The phase that the gate is about.")
    ] = "decode"
    minutes: Annotated[
        float, Field(gt=0, description="Time limit for each engine and workload, in minutes.")
    ] = 3.0
    sweep: Annotated[Sweep | None, Field(description="A grid to see where it pays.")] = None


class Verify(Frozen):
    """What is measured on the result; that it loads in a fresh process always is."""

    parity: Annotated[bool, Field(description="Engines against PyTorch.")] = True
    generation: Annotated[bool, Field(description="Generation stability beside dense.")] = True
    quality: Annotated[Quality | None, Field(description="Perplexity and tasks.")] = None
    speed: Annotated[Speed | None, Field(description="Engines against dense engines.")] = None


class Publish(Frozen):
    """Where the result may go; only `--publish` or `--push-to` on the command line sends it."""

    repo: Annotated[
        str | None,
        Field(description="Proposes `owner/name` on the Hub: `run --publish` uploads to it."),
    ] = None
    private: Annotated[
        bool,
        Field(description="Create it as private; `--push-to` does unless `--public` is given."),
    ] = True


def sources(document: Document) -> dict[str, Source]:
    """Reads the `data` section.

    Raises:
        RecipeError: a source that is none of the kinds, or a bad key of one.
    """
    found: dict[str, Source] = {}
    for name, body in _mapping(document, ("data",)).items():
        path: Path_ = ("data", name)
        if not _NAME.fullmatch(str(name)):
            raise RecipeError(
                document.where(path),
                f"got {name!r:.80} as a name of data, which artifacts are called by",
                "write a word, such as `calibration`",
            )
        kinds = [key for key in SOURCES if key in _mapping(document, path)]
        if len(kinds) != 1:
            raise RecipeError(
                document.where(path),
                f"names {len(kinds)} kinds of source, expected exactly one of `dataset`, `files`, "
                "`tokens`, `generated`",
                "write for example `files: [corpus/*.jsonl]`",
            )
        found[name] = model(document, path, SOURCES[kinds[0]], body)
    return found


def stages(document: Document, known_data: Mapping[str, Source]) -> tuple[Stage, ...]:
    """Reads the `stages` section.

    Raises:
        RecipeError: an unknown kind, method, key or value, or data that is not in `data`.
    """
    return tuple(_stages(document, known_data))


def _stages(document: Document, known_data: Mapping[str, Source]) -> Iterator[Stage]:
    for i, item in enumerate(_list(document, ("stages",))):
        path: Path_ = ("stages", i)
        if isinstance(item, dict) and set(item) == {"search"}:
            yield _search(document, (*path, "search"), item["search"], known_data)
        elif isinstance(item, dict) and set(item) == {"iterate"}:
            yield from _iterate(document, (*path, "iterate"), item["iterate"], known_data)
        else:
            yield _stage(document, path, item, (*_REGISTRY, "search", "iterate"), known_data)


def _stage(
    document: Document, path: Path_, item: Any, kinds: Any, known_data: Mapping[str, Source]
) -> Stage:
    kind = _single(document, path, item, kinds)
    body = _body(document, (*path, kind), item[kind])
    if "method" not in body:
        raise RecipeError(
            document.where((*path, kind)),
            "has no `method`",
            did_you_mean("", registry.names(_REGISTRY[kind])),
        )
    name, data = str(body.pop("method")), body.pop("data", _DEFAULT_DATA[kind])
    if data not in known_data and "data" in item[kind]:
        raise RecipeError(
            document.where((*path, kind, "data")),
            f"got {data!r}, which `data` does not define",
            did_you_mean(str(data), known_data),
        )
    entry = _entry(document, (*path, kind), _REGISTRY[kind], name, body, "method")
    return Stage(kind, name, entry, str(data))  # type: ignore[arg-type]


def _iterate(
    document: Document, path: Path_, body: Any, known_data: Mapping[str, Source]
) -> Iterator[Stage]:
    """Reads rounds of prune and heal as the stages that they are."""
    asked: Iterate = entry_from(Iterate, _body(document, path, body), document, path)
    for number, where, item in written_out(asked, document, path):
        stage = _stage(document, where, item, tuple(_REGISTRY), known_data)
        yield rounded(stage, number, asked, int(path[1]))


def _search(document: Document, path: Path_, body: Any, known_data: Mapping[str, Source]) -> Stage:
    """Reads a search; each candidate is checked as the stages that it will become."""
    body = _body(document, path, body)
    given = body.get("candidates") or []
    listed = [one if isinstance(one, list) else [one] for one in given]
    if not listed and not body.get("grid"):
        raise RecipeError(
            document.where(path), "has nothing to choose from", "write `candidates`, or a `grid`"
        )
    entry: Search = entry_from(Search, body | {"candidates": listed}, document, path)
    for i, candidate in enumerate(listed):
        at: Path_ = (*path, "candidates", i)
        if marks(candidate) != 1:
            raise RecipeError(
                document.where(at),
                f"says `to_target` {marks(candidate)} times, expected once",
                "write for example `prune: {method: block_influence, sparsity: to_target}`",
            )
        several = isinstance(given[i], list)
        for j, item in enumerate(candidate):
            where: Path_ = (*at, j) if several else at
            _stage(document, where, _tried(item), ("prune",), known_data)
    for point in entry.grid.items() if entry.grid else ():
        for one in point:
            at = (*path, "grid", "depth" if "remove" in one else "width")
            _stage(document, at, {"prune": _tried(dict(one))}, ("prune",), known_data)
    if entry.heal is not None:
        _stage(document, path, {"heal": dict(entry.heal)}, ("heal",), known_data)
    if entry.validation not in known_data:
        raise RecipeError(
            document.where((*path, "validation")),
            f"got {entry.validation!r}, which `data` does not define",
            did_you_mean(entry.validation, known_data),
        )
    for i, one in enumerate(entry.engines):
        _engine(document, (*path, "engines", i), dict(one), known_data)
    if entry.target.engine not in registry.names("exporters"):
        raise RecipeError(
            document.where((*path, "target", "engine")),
            f"got {entry.target.engine!r}, which is not an exporter",
            did_you_mean(entry.target.engine, registry.names("exporters")),
        )
    return Stage("search", "search", entry, entry.validation)


def _engine(
    document: Document, path: Path_, item: dict[str, Any], known_data: Mapping[str, Source]
) -> None:
    """Checks an engine that a search may choose: an exporter, and what quantizes for it."""
    how = item.pop(QUANTIZE, None)
    if how is not None:
        _stage(document, path, {QUANTIZE: how}, (QUANTIZE,), known_data)
    name = _single(document, path, item, registry.names("exporters"))
    _entry(document, (*path, name), "exporters", name, item[name] or {}, None)


def _tried(body: Any) -> Any:
    """Replaces `to_target` by a usual value, so that all else can be checked."""
    if isinstance(body, dict):
        return {key: _tried(one) for key, one in body.items()}
    if isinstance(body, list):
        return [_tried(one) for one in body]
    return 0.25 if body == TO_TARGET else body


def _body(document: Document, path: Path_, body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RecipeError(
            document.where(path), f"got {body!r:.60}, expected keys and values",
            "indent `key: value` lines below it",
        )  # fmt: skip
    return dict(body)


def exports(document: Document) -> tuple[Export, ...]:
    """Reads the `export` section: names, or names with parameters.

    Raises:
        RecipeError: an unknown exporter, key or value, or two that write the same directory.
    """
    found = []
    taken: dict[str, str] = {}
    for i, item in enumerate(_list(document, ("export",))):
        path: Path_ = ("export", i)
        item = {item: None} if isinstance(item, str) else item
        name = _single(document, path, item, registry.names("exporters"))
        entry = _entry(document, (*path, name), "exporters", name, item[name] or {}, None)
        if type(entry).DIRECTORY in taken:
            raise RecipeError(
                document.where(path),
                f"`{name}` and `{taken[type(entry).DIRECTORY]}`"
                f" both write {type(entry).DIRECTORY}/",
                "keep one of the two",
            )
        taken[type(entry).DIRECTORY] = name
        found.append(Export(name, entry))
    return tuple(found)


def _entry(
    document: Document,
    path: Path_,
    kind: registry.Kind,
    name: str,
    body: Any,
    key: str | None,
) -> Any:
    try:
        entry = registry.find(kind, name)
    except PlanError as error:
        at = (*path, key) if key else path
        raise RecipeError(document.where(at), error.problem, error.fix) from None
    if not isinstance(body, dict):
        raise RecipeError(document.where(path), f"got {body!r}, expected keys", "indent them below")
    return entry_from(entry, body, document, path)


def entry_from(cls: Any, body: Mapping[str, Any], document: Document, path: Path_) -> Any:
    """Makes an instance of a method, healer or exporter class from its recipe keys.

    Raises:
        RecipeError: an unknown key or a value that its field does not take.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for key in body:
        if key not in known:
            raise RecipeError(
                document.where((*path, key)),
                f"`{key}` is not a key of {cls.__module__.rsplit('.', 1)[-1]}",
                did_you_mean(key, known) or "it takes no keys",
            )
    try:
        return checker(cls).validate_python(body)
    except ValidationError as error:
        raise translated(document, path, error) from None
    except PlanError as error:
        # It is about a key (`onnx.sliding`), a value of one (`include: dwn`), or more than one.
        named, _, value = error.where.partition(":")
        key = named.rpartition(".")[2]
        at = (*path, key) if key in body else path
        subject = "" if key in body and not value else f"{error.where}: "
        raise RecipeError(document.where(at), subject + error.problem, error.fix) from None


def model(document: Document, path: Path_, schema: type[M], body: Any) -> M:
    """Makes a pydantic model from a section of the document.

    Raises:
        RecipeError: an unknown key or a value that its field does not take.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise translated(document, path, error, schema) from None


def _mapping(document: Document, path: Path_) -> dict[str, Any]:
    data: Any = document.data
    for step in path:
        data = data.get(step) if isinstance(data, dict) else data[int(step)]
        if data is None:
            return {}
    if not isinstance(data, dict):
        raise RecipeError(
            document.where(path),
            f"got {data!r:.60}, expected keys and values",
            "indent `key: value` lines below it",
        )
    return data


def _list(document: Document, path: Path_) -> list[Any]:
    data = document.data.get(path[0])
    if data is None:
        return []
    if not isinstance(data, list):
        raise RecipeError(
            document.where(path), f"got {data!r:.60}, expected a list", "start each entry with `- `"
        )
    return data


def _single(document: Document, path: Path_, item: Any, known: Any) -> str:
    if not isinstance(item, dict) or len(item) != 1:
        raise RecipeError(
            document.where(path),
            f"got {item!r:.60}, expected one key",
            "write for example `- prune: {method: angular_distance, sparsity: 0.4}`",
        )
    name = str(next(iter(item)))
    if name not in known:
        raise RecipeError(
            document.where((*path, name)), f"`{name}` is unknown here", did_you_mean(name, known)
        )
    return name
