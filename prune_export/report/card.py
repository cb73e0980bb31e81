"""README.md, the Hub's model card: front matter that the Hub understands, measured numbers only.

Everything that a report brings is escaped for Markdown where it is printed; a name or a recipe
cannot open a table cell, a fence or a tag of its own.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from prune_export import registry
from prune_export.display.escapes import escaped_page
from prune_export.exporter_facts import ExporterFacts
from prune_export.report import table
from prune_export.report.benchmarks import benchmark_of
from prune_export.report.caveats import caveats
from prune_export.report.figures import figure_names
from prune_export.report.healing import healing_text
from prune_export.report.html import scalars, value_text, what_was_done
from prune_export.report.reading import Report, text_from_blocks
from prune_export.units import text_from_bytes, text_from_count, text_from_seconds

_LICENSE: Final = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_ARXIV: Final = re.compile(r"arXiv:(\d{4}\.\d{5})")


@dataclass(frozen=True)
class Paper:
    """A paper to cite; without `authors`, only its link is known."""

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def link(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def bibtex(self) -> str:
        first = self.authors.split(" and ")[0].split()[-1].lower()
        return (
            f"@article{{{first}{self.year}_{self.arxiv.replace('.', '_')},\n"
            f"  title = {{{{{self.title}}}}},\n  author = {{{self.authors}}},\n"
            f"  year = {{{self.year}}},\n  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv}\n}"
        )


def model_card(report: Report | Mapping[str, Any], *, repo_id: str | None = None) -> str:
    """Makes the card of a report; its examples load from `repo_id`, else from this directory."""
    report = Report.of(report)
    found = caveats(report)
    body = _environment().get_template("card.md.j2").render(
        report=report,
        title=_title(report, repo_id),
        repo_id=repo_id,
        sentence=what_was_done(report),
        summary=Markup(table.markdown(table.summary_rows(report))),
        figures=figure_names(report),
        failures=[one.text for one in found if one.kind == "failure"],
        limits=[one.text for one in found if one.kind == "limit"],
        papers=_cited(report),
        examples=_examples(report, repo_id),
    )  # fmt: skip
    front = card_data(report, repo_id=repo_id).to_yaml()
    return escaped_page(f"---\n{front}\n---\n\n{body}")


def card_data(report: Report, *, repo_id: str | None = None) -> ModelCardData:
    """Makes the front matter: nothing in it is guessed, what is not known is left out."""
    extra: dict[str, Any] = {}
    hub_base = _hub_base(report)
    if hub_base and report.heals:
        # The Hub knows adapter, merge, quantized and finetune, and has no word for pruned. Healing
        # trains every surviving weight it touches: that is a finetune. Without healing none is
        # true, so none is claimed. `quantized` never is: engines may hold int8 or int4 weights,
        # but the checkpoint at the root, which the relation is about, keeps the base's precision.
        extra["base_model_relation"] = "finetune"
    license_id = (report.base.license or "").strip().lower()
    engines = ["onnx"] if any("onnx" in one.graph for one in report.exports) else []
    methods = [_flat(stage.name) for stage in report.stages]
    results = _eval_results(report)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if report.base.wrapper else "text-generation",
        license=license_id if _LICENSE.fullmatch(license_id) and license_id != "other" else None,
        base_model=hub_base,
        datasets=_trained_on(report) or None,
        tags=["pruning", "compression", *methods, *engines, "prune-export"],
        model_name=_title(report, repo_id) if results else None,
        eval_results=results or None,
        **extra,
    )


@cache
def papers() -> dict[str, Paper]:
    """Loads the known papers, by arXiv number."""
    text = files("prune_export.report").joinpath("papers.yaml").read_text(encoding="utf-8")
    return {arxiv: Paper(arxiv=arxiv, **entry) for arxiv, entry in yaml.safe_load(text).items()}


def sources(name: str) -> tuple[str, ...]:
    """Finds the arXiv numbers that a method's or healer's docstring names after `Source:`."""
    found: list[str] = []
    for kind in registry.KINDS:
        if name in registry.names(kind):
            _, _, source = (registry.find(kind, name).__doc__ or "").partition("Source:")
            found += _ARXIV.findall(source.partition("Differs:")[0])
    return tuple(dict.fromkeys(found))


def fenced(text: str, language: str = "") -> Markup:
    """Fences a code block that the text cannot close: with more backticks than any run in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def spanned(text: str) -> Markup:
    """Makes a code span on one line that the text cannot close."""
    flat = _flat(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return Markup(f"{fence}{pad}{flat}{pad}{fence}")


def _title(report: Report, repo_id: str | None) -> str:
    if repo_id:
        return repo_id.rpartition("/")[2]
    name = _flat(report.base.name).removesuffix(".gguf")
    if not report.stages:
        return f"{name}, exported"
    fewer = report.result.layers != report.base.layers
    made = "quantized" if report.quantizes and not report.prunes else "pruned"
    return f"{name}, pruned to {report.result.layers} blocks" if fewer else f"{name}, {made}"


def _hub_base(report: Report) -> str | None:
    base = report.base
    return base.model if base.revision and _HUB_ID.fullmatch(base.model) else None


def _trained_on(report: Report) -> list[str]:
    """The Hub datasets used for calibration or healing, without those for evaluation."""
    used = (entry for name, entry in report.data.items() if name != report.evaluation)
    ids = [str(entry["dataset"]) for entry in used if entry.get("dataset")]
    return [one for one in dict.fromkeys(ids) if _HUB_ID.fullmatch(one) or one.isidentifier()]


def _eval_results(report: Report) -> list[EvalResult]:
    """The published checkpoint's perplexity and task scores, those that are numbers."""
    results = []
    final = report.perplexity(report.final_name)
    if final is not None and math.isfinite(final.value):
        source = report.data.get(report.evaluation, {})
        names = source.get("files") or ["held-out text"]
        local = ", ".join(str(name).rpartition("/")[2] for name in names)
        known = {key: str(value) for key in ("config", "split", "revision")
                 if (value := source.get(key))}  # fmt: skip
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=_flat(str(source.get("dataset") or "local-text")),
                dataset_name=_flat(str(source.get("dataset") or local)),
                dataset_config=known.get("config"),
                dataset_split=known.get("split"),
                dataset_revision=known.get("revision"),
                metric_type="perplexity",
                metric_name=f"Perplexity, {final.windows} windows of {final.length} tokens",
                metric_value=round(final.value, 4),
            )
        )
    results += [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=_flat(task.name),
            dataset_name=_flat(task.name),
            metric_type=_flat(task.metric),
            metric_name=f"{_flat(task.metric)}, {task.samples} samples"
            + (f", engine {_flat(task.engine)}" if task.engine else ""),
            metric_value=round(task.pruned, 4),
        )
        for task in (report.verification.tasks if report.verification else ())
        if math.isfinite(task.pruned) and benchmark_of(task) is None
    ]
    return results


def _cited(report: Report) -> list[tuple[str, Paper]]:
    names = dict.fromkeys(stage.name for stage in report.stages)
    return [
        (name, papers().get(arxiv, Paper(f"arXiv:{arxiv}", "", 0, arxiv)))
        for name in names
        for arxiv in sources(name)
    ]


def _examples(report: Report, repo_id: str | None) -> list[Markup]:
    """How each engine is run, the shortest first; exporters bring their templates."""
    found = []
    for export in report.exports:
        example = ExporterFacts.of_name(export.exporter).example
        if not example:
            continue
        home = Path(inspect.getfile(registry.find("exporters", export.exporter)))
        text = home.with_name(example).read_text(encoding="utf-8")
        found.append(_environment().from_string(text).render(export=export, repo_id=repo_id))
    return [Markup(text) for text in sorted(filter(str.strip, found), key=len)]


def _served(exporter: str) -> Markup:
    """The command that runs an engine; nothing for an exporter that is not known here."""
    known = exporter in registry.names("exporters")
    known = known and not ExporterFacts.of_name(exporter).unopened
    return spanned(f"prune-export serve . --engine {exporter}") if known else Markup()


def _flat(text: str) -> str:
    return " ".join(text.split())


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prune_export.report"),
        # Escaping for Markdown, not for HTML: every printed value goes through it unless a filter
        # made it Markup.
        autoescape=False,
        finalize=lambda value: (
            value if isinstance(value, Markup) else Markup(table.escape_markdown(str(value)))
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "blocks": text_from_blocks,
        "bytes": text_from_bytes,
        "code": spanned,
        "count": text_from_count,
        "fenced": fenced,
        "healing": healing_text,
        "literal": Markup,
        "string": lambda text: Markup(json.dumps(_flat(text))),
        "runtime": lambda name: ExporterFacts.of_name(name).runtime or name,
        "scalars": scalars,
        "served": _served,
        "seconds": text_from_seconds,
        "value": value_text,
        "workload": table.workload_text,
    }
    return environment
