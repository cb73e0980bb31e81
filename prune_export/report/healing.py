"""Says what a healing trained, for what and on what, and how far from its teacher it came.

A report may be a stranger's: what its log says is looked at before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from prune_export.report.reading import Report, StageReading
from prune_export.units import text_from_count

_DIVERGENCES: Final = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jsd": "generalized Jensen-Shannon divergence",
}
_MOST_WORDS: Final = 12


def healing_text(stage: StageReading, report: Report) -> str:
    """What was trained, for what and on what, in a few sentences; empty where it is not known."""
    training = _mapping(stage.log, "training")
    if stage.kind != "heal" or not training:
        return ""
    parts = [_what(training), _for_what(stage, training), _on_what(stage, report)]
    return " ".join([*filter(None, parts), held_out_text(stage)]).strip()


def held_out_text(stage: StageReading) -> str:
    """The next-token loss on healing text that was held out, and the teacher's; may be empty."""
    found = held_out(stage)
    if not {"before", "merged"} <= found.keys():
        return ""
    text = f"Held-out next-token loss: {found['before']:.3f} before, {found['merged']:.3f} after"
    text += f", {found['teacher']:.3f} of the teacher itself" if "teacher" in found else ""
    return f"{text}."


def held_out(stage: StageReading) -> dict[str, float]:
    """The held-out losses in nats a token, those that are numbers."""
    losses = _mapping(_mapping(stage.log, "held_out"), "loss")
    return {
        str(name): float(loss)
        for name, loss in losses.items()
        if isinstance(loss, int | float) and math.isfinite(loss)
    }


def distilled(stage: StageReading) -> Mapping[str, Any] | None:
    """The keys of the distillation; None where the next token was learnt."""
    objective = _mapping(_mapping(stage.log, "training"), "objective")
    how = objective.get("distill")
    return how if isinstance(how, Mapping) else None


def floor(stage: StageReading) -> float | None:
    """What the training's loss would be if the student were its teacher; None if not known.

    A divergence is 0 then, and of cross entropy there is the teacher's own.
    """
    how = distilled(stage)
    if how is None:
        return None
    share, own = _number(how, "cross_entropy") or 0.0, held_out(stage).get("teacher")
    if not share:
        return 0.0
    return None if own is None else share * own


def _what(training: Mapping[str, Any]) -> str:
    roles = training.get("targets")
    named = [str(role) for role in roles[:_MOST_WORDS]] if isinstance(roles, list) else []
    more = ", …" if isinstance(roles, list) and len(roles) > _MOST_WORDS else ""
    where = f" ({', '.join(named)}{more})" if named else ""
    adapters, own = _number(training, "adapter_parameters"), _number(training, "trained_parameters")
    if own is not None:
        what = f"{text_from_count(int(own))} weights themselves{where}"
    elif adapters is not None:
        rank = _number(training, "rank")
        what = f"adapters of {f'rank {rank:g}, ' if rank else ''}"
        what += f"{text_from_count(int(adapters))} numbers{where}"
    else:
        return ""
    steps, batch = _number(training, "steps"), _number(training, "batch")
    text = f"Trained {what}"
    return f"{text}, {steps:g} steps of {batch:g} windows." if steps and batch else f"{text}."


def _for_what(stage: StageReading, training: Mapping[str, Any]) -> str:
    how = distilled(stage)
    if how is None:
        return "Learnt the next token."
    teacher = _mapping(stage.log, "teacher").get("model")
    text = f"Learnt to say what {teacher or 'its teacher'} says ("
    text += _DIVERGENCES.get(str(how.get("divergence")), "a divergence")
    if share := _number(how, "cross_entropy"):
        text += f", {share:.0%} next token"
    kept = _number(training, "kept")
    text += f", {kept:g} likeliest tokens kept" if kept else ", the teacher beside it"
    if own := _number(how, "on_policy"):
        text += f", {own:.0%} of the steps on what it says itself"
    if hidden := _mapping(how, "hidden"):
        text += f", hidden states {str(hidden.get('by')).replace('_', ' ')}"
    return f"{text})."


def _on_what(stage: StageReading, report: Report) -> str:
    about = report.data.get(stage.data)
    if not stage.data or about is None:
        return ""
    size = [_number(about, "samples"), _number(about, "length")]
    text = f"Data: `{stage.data}`"
    text += f", {size[0]:g} windows of {size[1]:g} tokens" if all(size) else ""
    said = said_text(about)
    return f"{text}, {said}." if said else f"{text}."


def said_text(about: Mapping[str, Any]) -> str:
    """Whose answers a data set is made of, and how many; empty where it is text."""
    told = _mapping(about, "generated")
    if not told:
        return ""
    prompts = told.get("prompts")
    to = {"none": "free samples", "bundled": "answers to bundled prompts"}.get(
        str(prompts), "answers to the user's prompts"
    )
    count = _number(told, "answers")
    text = f"{count:,.0f} {to} by {told.get('model')}" if count else f"{to} by {told.get('model')}"
    source = str(told.get("from"))
    return f"{text} at {source}" if "://" in source else text


def terms_of(about: Mapping[str, Any]) -> str:
    """What binds a data set's answers, as far as is known; may be empty."""
    terms = _mapping(about, "generated").get("terms")
    return terms if isinstance(terms, str) else ""


def _mapping(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = found.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(found: Mapping[str, Any], key: str) -> float | None:
    value = found.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None  # type: ignore[arg-type]
