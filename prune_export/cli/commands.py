"""The commands `run`, `plan`, `inspect`, `export` and `verify`; others join here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_export import __version__
from prune_export.cli import console, options
from prune_export.cli.asking import faster, smaller
from prune_export.cli.comparing import compare
from prune_export.cli.doctoring import doctor
from prune_export.cli.families import families as families_of
from prune_export.cli.help import Command, Group
from prune_export.cli.listing import methods, schema
from prune_export.cli.others import commands_of_others
from prune_export.cli.publishing import destination, publish
from prune_export.cli.reproducing import reproduce
from prune_export.cli.running import carry_out
from prune_export.cli.sharing import announce, recipes
from prune_export.cli.showing import show_plan
from prune_export.cli.storing import store_app
from prune_export.errors import VerifyError
from prune_export.units import text_from_bytes, text_from_seconds

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Prune, heal, export and verify language models from a declarative recipe.",
)
app.add_typer(store_app, name="store")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe: file, bundled name or hf://owner/name.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.output.put(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    del version


@app.command(cls=Command)
def run(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The result directory.")],
    model: options.Model = None,
    data: options.Data = None,
    time: options.Time = None,
    data_root: options.DataRoot = None,
    sets: options.Sets = None,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    force: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP",
            help="Do a step again: `heal`, `export.onnx`, `verify.speed`. Repeatable.",
        ),
    ] = None,
    ignore_config_key: options.IgnoreKeys = None,
    allow_owner: options.Owners = None,
    families: options.Families = None,
    push_to: Annotated[
        str | None, typer.Option(metavar="REPO", help="Publish the result to `owner/name`.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Publish the result to where the recipe proposes.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Create that repository as public.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a recipe: prune, heal, export, verify, report.

    prune-export run depth40-angular-qlora --model meta-llama/Llama-3.1-8B --out out/
    prune-export run my.yaml -m ./checkpoint -o out/ -s stages.0.prune.remove=6

    Killed or interrupted, the same command goes on where it was. Started by torchrun or accelerate
    launch, all processes heal together; the first does all else.
    """
    from prune_export.execution import Options, with_data
    from prune_export.recipe import Recipe

    team = options.team()
    loaded = Recipe.load(recipe, overrides=sets or (), data_root=data_root, allow=allow_owner or ())
    announce(loaded, model, own_data=bool(data))
    loaded, model = with_data(loaded, model, data or ())
    repo = destination(loaded.publish.repo, push_to, publish=publish)
    chosen = Options(
        out=out,
        store=options.store_directory(store),
        machine=options.machine(ram, threads, device),
        force=frozenset(force or ()),
        seconds=options.seconds(time),
        ignore_keys=tuple(ignore_config_key or ()),
        command=options.command_line(),
        team=team,
    )
    # The recipe's own word for it counts only where its repository was asked for.
    open_to_all = public or (not push_to and not loaded.publish.private)
    carry_out(
        loaded, model, chosen, dry_run=dry_run, json=json, quiet=quiet,
        repo=repo, private=not open_to_all,
    )  # fmt: skip


@app.command(cls=Command)
def plan(
    recipe: RecipeName,
    model: options.Model = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The result directory.")
    ] = Path("out"),
    data: options.Data = None,
    time: options.Time = None,
    data_root: options.DataRoot = None,
    sets: options.Sets = None,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    ignore_config_key: options.IgnoreKeys = None,
    allow_owner: options.Owners = None,
    families: options.Families = None,
    devices: options.Devices = 1,
    device_memory: options.DeviceMemory = None,
    device_tflops: options.DeviceTflops = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what a recipe would do to a model and what it would take; read no weights, write nothing.

    prune-export plan depth40-angular-qlora --model ./Llama-3.1-70B --ram 64GiB
    prune-export plan depth40-angular-qlora -m ./Llama-3.1-70B --devices 8 --device-memory 80GiB

    The model may be a directory that holds only a config.json.
    """
    from prune_export.execution import Options, with_data
    from prune_export.execution import plan as plan_of
    from prune_export.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=sets or (), data_root=data_root, allow=allow_owner or ())
    announce(loaded, model, own_data=bool(data))
    loaded, model = with_data(loaded, model, data or ())
    chosen = Options(
        out=out,
        store=options.store_directory(store),
        machine=options.machine(ram, threads, device),
        seconds=options.seconds(time),
        ignore_keys=tuple(ignore_config_key or ()),
        ram_limit=options.size(ram, "--ram") if device_memory else None,
        devices=options.planned_devices(devices, device_memory, device_tflops),
    )
    show_plan(plan_of(loaded, model, chosen), as_json=json)


for listing in (smaller, faster, recipes, methods, families_of, schema):
    app.command(cls=Command)(listing)


@app.command(cls=Command)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, directory or .gguf.")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data", "-d", metavar="FILE", help="Text, JSON-lines or Parquet. Repeatable."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The picture.")] = Path(
        "inspect.png"
    ),
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows.")] = 64,
    length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens in a window.")] = 512,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the choice of windows.")
    ] = 0,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    ignore_config_key: options.IgnoreKeys = None,
    families: options.Families = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw how redundant a model's blocks are: the angular-distance map and block influence.

    prune-export inspect ./SmolLM2-135M --data corpus.jsonl --out map.png
    """
    from prune_export.cli.inspecting import inspected, shown

    found = inspected(
        model, data, samples=samples, length=length, seed=seed, picture=out,
        store=options.store_directory(store), machine=options.machine(ram, threads, device),
        ignore_keys=tuple(ignore_config_key or ()), progress=console.progress(quiet=quiet or json),
        command=options.command_line(),
    )  # fmt: skip
    shown(found, out, as_json=json)


@app.command(cls=Command)
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, directory or .gguf.")],
    to: Annotated[str, typer.Option(metavar="EXPORTER", help="An exporter: `onnx`, `ort_genai`.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="The engine's directory.")
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="A key of the exporter: `precision=int8`. Repeatable.",
        ),
    ] = None,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    ignore_config_key: options.IgnoreKeys = None,
    families: options.Families = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Make an engine of a checkpoint, pruned or not, and test that it loads.

    prune-export export out/ --to ort_genai --set precision=int4 --out engine/
    """
    from prune_export.cli.engines import exported

    record = exported(
        checkpoint, to, sets or (), out, store=options.store_directory(store),
        machine=options.machine(ram, threads, device), ignore_keys=tuple(ignore_config_key or ()),
        progress=console.progress(quiet=quiet or json), command=options.command_line(),
    )  # fmt: skip
    if json:
        console.print_json(record)
        return
    console.output.put(
        f"{out / record['graph']}: {text_from_bytes(record['weight_bytes'])} of weights "
        f"are read for each token, built in {text_from_seconds(record['seconds'])}"
    )
    for note in record["notes"]:
        console.output.put(f"note: {note}")


@app.command(cls=Command)
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A result directory.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", "-d", metavar="FILE", help="Text for perplexity and parity. Repeatable."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of the text.")] = 16,
    length: Annotated[int, typer.Option(min=32, metavar="N", help="Tokens in a window.")] = 512,
    trust_engine: options.TrustEngine = False,
    families: options.Families = None,
    store: options.StoreDir = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
    device: options.Device = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure a result directory again: reload, engines against PyTorch, generation, perplexity.

    prune-export verify out/ --data corpus.jsonl

    Exit status 1 when it does not reload or an engine does not agree with PyTorch.
    """
    from prune_export.cli.engines import show_verification, verified

    found = verified(
        directory, data or [], samples=samples, length=length,
        trust=trust_engine, store=options.store_directory(store),
        machine=options.machine(ram, threads, device),
        progress=console.progress(quiet=quiet or json),
    )  # fmt: skip
    if json:
        console.print_json(found.to_json())
    else:
        show_verification(found)
    if not found.ok:
        raise VerifyError(str(directory), "does not reload, or an engine differs from PyTorch",
                          "export again, or run the recipe again")  # fmt: skip


for last in (reproduce, compare, publish, doctor):
    app.command(cls=Command)(last)

for entry in commands_of_others():
    app.command(entry.name, cls=Command)(entry.command)
