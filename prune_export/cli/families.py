"""The commands `families`: what is known of model families, and tables derived and proven."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_export.cli import console, options
from prune_export.errors import PlanError, UnsupportedArch, VerifyError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prune_export.arch.table import Table
    from prune_export.deriving.proof import Check

_NAME = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]",
        help="A family or a model type, to show the facts of; `derive` or `prove`, to make or test "
        "a table.",
    ),
]
_SUBJECT = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL|FILE]", help="What to derive a table of, or to prove."),
]


def families(
    name: _NAME = None,
    subject: _SUBJECT = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where `derive` writes the table."),
    ] = None,
    directory: options.Families = None,
    store: options.StoreDir = None,
    json: options.Json = False,
) -> None:
    """List the model families that are known, show one, or derive and prove a table.

    prune-export families
    prune-export families qwen3
    prune-export families derive ./model -o mine/table.yaml
    prune-export families prove mine/table.yaml

    `derive` makes the table of a model type that has none, from its config.json alone, and proves
    it on small random models. What it writes can be mended by hand, proven again, and used with
    `--families mine`. Exit status 1: something was disproved.
    """
    del directory  # its callback has used it
    if name in ("derive", "prove"):
        if not subject:
            what = "MODEL" if name == "derive" else "FILE or MODEL"
            raise PlanError(f"families {name}", f"is given no {what}", f"add one: {what}")
        checks, table, seconds = _derived(subject, out) if name == "derive" else _proven(subject)
        _show_checks(checks, table, seconds, as_json=json, out=out)
        return
    if subject or out:
        raise PlanError(
            f"families {name}", "takes nothing more", "write `families derive MODEL -o FILE`"
        )
    store_root = options.store_directory(store)
    options.use_kept_families(store_root)
    _listed(as_json=json) if name is None else _facts(name, as_json=json)


def _listed(*, as_json: bool) -> None:
    from prune_export.arch.table import tables

    found = {table.family: table for table in tables().values()}
    rows = [(name, ", ".join(own.model_types), _kind(own)) for name, own in sorted(found.items())]
    if as_json:
        keys = ("family", "model_types", "source")
        console.print_json(
            [dict(zip(keys, (name, own.model_types, own.source), strict=True))
             for name, own in sorted(found.items())]
        )  # fmt: skip
        return
    console.table("", ["family", "model types", "parts"], rows, left=[0, 1, 2])
    console.output.put(
        f"{len(rows)} families. A model of another type is derived and proven when it is planned; "
        "docs/families.md says what was proven of each."
    )


def _kind(table: Table) -> str:
    roles = {row.role for row in table.block}
    words = ["mixture"] if any(role.startswith("expert") for role in roles) else []
    words += ["latent attention"] if "kv_b" in roles else []
    words += ["derived"] if table.derived else []
    return ", ".join(words) or "dense"


def _facts(name: str, *, as_json: bool) -> None:
    from prune_export.arch.facts import facts_of
    from prune_export.arch.table import tables

    known = {table.family: table for table in tables().values()} | dict(tables())
    if name not in known:
        raise PlanError(
            f"families {name}",
            "is no family or model type that a table describes",
            f"{did_you_mean(name, known)}; `prune-export families derive MODEL` makes one",
        )
    facts = facts_of(known[name])
    if as_json:
        console.print_json(facts)
        return
    console.pairs([(key, str(value)) for key, value in facts.items()])


def _full_config(model: str) -> dict[str, Any]:
    from prune_export.checkpoint import resolve_model
    from prune_export.execution.asked import config_of

    path, _ = resolve_model(model)
    return config_of(path).full_config()


def _derived(model: str, out: Path | None) -> tuple[Sequence[Check], Table, float]:
    from prune_export.deriving.making import derive
    from prune_export.deriving.writing import text_of
    from prune_export.system.locking import write_atomically

    if out is not None and out.suffix != ".yaml":
        raise PlanError(
            f"--out {out}", "is no .yaml file", f"write `-o {out.with_suffix('.yaml')}`"
        )
    if out is not None and out.exists():
        raise PlanError(str(out), "is there already", "remove it, or name another file")
    found = derive(_full_config(model))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A person mends it from here on: it is a table like any other, proven by `families prove`.
        write_atomically(out, text_of(found.table.model_copy(update={"derived": None})))
    else:
        console.output.put(text_of(found.table))
    return found.checks, found.table, found.seconds


def _proven(subject: str) -> tuple[Sequence[Check], Table, float]:
    from prune_export.arch.table import parse_table
    from prune_export.deriving.making import derive, prove_table

    if not subject.endswith((".yaml", ".yml")):
        found = derive(_full_config(subject))
        return found.checks, found.table, found.seconds
    file = Path(subject)
    if not file.is_file():
        raise UnsupportedArch(subject, "no such file", "give a table: a .yaml file, or a model")
    table = parse_table(file.read_text(encoding="utf-8"), subject)
    checks, seconds = prove_table(table)
    return checks, table, seconds


def _show_checks(
    checks: Sequence[Check], table: Table, seconds: float, *, as_json: bool, out: Path | None
) -> None:
    failed = [one for one in checks if not one.ok and not one.refused]
    if as_json:
        console.print_json(
            {
                "family": table.family,
                "seconds": round(seconds, 2),
                "out": str(out) if out else None,
                "checks": [{"what": c.what, "came": c.word, "found": c.found} for c in checks],
            }
        )
    else:
        rows = [(one.what, one.word, one.found) for one in checks]
        console.table(f"{table.family}: {seconds:.1f} s", ["check", "", "found"], rows,
                      left=[0, 1, 2])  # fmt: skip
        if out is not None:
            console.output.put(f"table  {out}")
    if failed:
        first = failed[0]
        raise VerifyError(
            f"{table.family}  {first.what}",
            first.found,
            "what is not proven is refused: mend the table, or leave that part of the model whole",
        )
