"""Writes the measured part of README.md, so that no number in it is typed.

    python benchmarks/readme_table.py benchmarks/results/<run>.json [--check]

Between the markers `<!-- demo:begin -->` and `<!-- demo:end -->` goes the table of a committed
report.json, and docs/img/demo.png is its figure. `--check` writes nothing and exits with 1 where
either is not what the report gives. The picture is compared by the report's hash, which it carries:
another version of the font renderer moves pixels without making it wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

from PIL import Image

from prune_export.errors import PruneExportError
from prune_export.report import Report, draw_summary, markdown, summary_rows
from prune_export.report.card import spanned
from prune_export.report.figures import figure_names
from prune_export.report.html import what_was_done
from prune_export.report.table import escape_markdown

BEGIN = "<!-- demo:begin -->"
END = "<!-- demo:end -->"
ROOT = Path(__file__).resolve().parents[1]


def section(report: Report, source: Path, readme: Path, image: Path) -> str:
    """What stands between the markers; links are relative to the README.

    Raises:
        ValueError: the report has nothing to draw.
    """
    if "summary.png" not in figure_names(report):
        raise ValueError(f"{source} has nothing to draw")

    def link(target: Path) -> str:
        return Path(os.path.relpath(target, readme.parent)).as_posix()

    machine = report.verification.machine if report.verification else report.machine
    where = ", ".join(
        text
        for text in (
            str(machine.get("processor", "")),
            f"{machine['cores']} cores" if "cores" in machine else "",
            str(machine.get("gpu", "")),
        )
        if text
    )
    return "\n".join(
        (
            f"<!-- made by benchmarks/readme_table.py from {link(source)}; do not edit -->",
            "",
            f"![{escape_markdown(what_was_done(report))}]({link(image)})",
            "",
            markdown(summary_rows(report)).rstrip("\n"),
            "",
            f"Command: {spanned(report.command)}. {escape_markdown(where) or 'Machine unknown'}; "
            f"brackets hold 95 % intervals; raw samples in [{link(source)}]({link(source)}).",
        )
    )


def with_section(text: str, body: str) -> str:
    """The README's text with the section replaced.

    Raises:
        ValueError: a marker is missing, doubled or out of order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"expected one `{BEGIN}` and, after it, one `{END}`")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.partition(END)[2]}"


def hash_in(image: Path) -> str:
    """The hash of the report that a picture was drawn from; empty where there is none."""
    if not image.is_file():
        return ""
    with Image.open(image) as opened:
        return str(opened.info.get("Source", ""))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "img" / "demo.png")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if outdated")
    given = parser.parse_args(arguments)
    try:
        report = Report.load(given.report)
        text = given.readme.read_text(encoding="utf-8")
        made = with_section(text, section(report, given.report, given.readme, given.image))
    except (PruneExportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    digest = "sha256:" + hashlib.sha256(given.report.read_bytes()).hexdigest()
    current = {given.readme: made == text, given.image: hash_in(given.image) == digest}
    outdated = [path for path, is_current in current.items() if not is_current]
    if given.check:
        for path in outdated:
            print(f"{path} is not what {given.report} gives: run this without --check")
        return 1 if outdated else 0
    given.image.parent.mkdir(parents=True, exist_ok=True)
    draw_summary(report, given.image, source=digest)
    given.readme.write_text(made, encoding="utf-8")
    print(f"wrote {given.readme} and {given.image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
