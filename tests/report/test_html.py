"""The page: well-formed, self-contained, everything escaped, failures as plain as successes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prune_export.report import html
from prune_export.report.card import model_card
from prune_export.report.html import (
    figure_of,
    render_page,
    scalars,
    ticked,
    value_text,
    what_was_done,
)
from prune_export.report.reading import Report
from prune_export.report.table import summary_rows
from tests.report.variants import made

VOID = {"meta", "img", "br", "hr", "link", "input"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section",
    "article", "h1", "h2", "h3", "h4", "p", "b", "span", "strong", "div", "table", "thead", "tbody",
    "tr", "th", "td", "figure", "img", "ol", "ul", "li", "dl", "dt", "dd", "details", "summary",
    "blockquote", "pre", "code",
}  # fmt: skip
"""What our template uses: no script, link, iframe or form, whatever the report holds."""


class Page(HTMLParser):
    """Checks nesting, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def words(name: str, tmp_path: Path) -> str:
    """The page's text without its figures."""
    report = made(name)
    for stage in report.get("stages", ()):
        for key in ("distance_map", "block_scores", "loss"):
            stage["log"].pop(key, None)
    (tmp_path / "quality.png").write_bytes(PNG)
    (tmp_path / "speed.png").write_bytes(PNG)
    return Page(render_page(report, tmp_path)).words


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (800).to_bytes(4, "big") + (400).to_bytes(4, "big")


def test_well_formed_and_alone(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags <= TAGS
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("href", "srcset", "action", "style"), (tag, name)
        if name == "src":
            assert value.startswith("data:image/png;base64,")
    assert "url(" not in text
    assert "@import" not in text
    policy = [value for tag, name, value in page.attributes if (tag, name) == ("meta", "content")]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy
    pictures = {path.name for path in (written / "figures").iterdir()} - {"summary.png"}
    assert text.count("<img ") == len(pictures)


def test_hostile_text_is_text(tmp_path: Path) -> None:
    shown = words("hostile", tmp_path)
    assert shown.count('<script>alert("1")</script>') > 20
    assert "{{7*7}}" in shown
    assert "模型🦙" in shown


def test_says_verified_only_where_it_is(tmp_path: Path) -> None:
    assert "exported to onnx, genai. verified" in words("full", tmp_path)
    assert "Failed checks" not in words("full", tmp_path)
    for name in ("failures", "not_numbers", "hostile"):
        shown = words(name, tmp_path)
        assert "verification failed" in shown
        assert "Failed checks" in shown
    assert "not verified" in words("no_verification", tmp_path)
    assert "Nothing was verified" in words("no_verification", tmp_path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    shown = words("least", tmp_path)
    for text in (
        "No stage ran.", "Perplexity was not measured.", "Speed was not measured.",
        "No engine was exported.", "Nothing was changed.",
    ):  # fmt: skip
        assert text in shown
    assert "Nothing" in what_was_done(Report.of(made("least")))


def test_zeros_are_told_and_what_they_are_not_good_for(tmp_path: Path) -> None:
    shown = words("sparse", tmp_path)
    assert "Set 53.0M of 106.0M weights to zero (0.5 unstructured)." in shown
    assert "Zeros without a pattern are no faster." in shown


def test_speed_rows_hold_interval_floor_bound_and_samples(tmp_path: Path) -> None:
    shown = words("full", tmp_path)
    assert (
        "onnx, decode 1.17× faster (1.16–1.17) 23.6 → 27.4 0.98–1.02 98 % of 1.19× "
        "14 + 14 in 3 launches"
    ) in shown
    assert "no speedup: 1.01× (1.01–1.02)" in shown
    assert "Workload: prompt 128, new 32 tokens." in shown
    assert "batch 8, prompt 2048, new 256" in words("large", tmp_path)


def test_no_speedup_stands_in_the_headline(tmp_path: Path) -> None:
    assert "decode, onnx no speedup 1.00×, 0.98–1.01" in words("no_speedup", tmp_path)


def test_provenance(tmp_path: Path) -> None:
    report = made("full")
    shown = words("full", tmp_path)
    assert report["command"] in shown
    assert report["data"]["healing"]["fingerprint"] in shown
    assert report["base"]["id"] in shown
    assert "memory 24.00 GiB" in shown
    assert "stages: - prune: {method: angular_distance, sparsity: 0.2}" in shown


def test_one_sentence() -> None:
    assert what_was_done(Report.of(made("full"))) == (
        "6 of 30 blocks (13–18) were removed by angular_distance; healed with qlora; "
        "exported to onnx, genai."
    )


def test_a_quantized_model_is_called_so() -> None:
    report = made("full")
    report["stages"] = [
        {"index": 0, "kind": "quantize", "name": "gptq", "parameters": {}, "id": "q",
         "log": {"grid": "4 bits, groups of 32, asymmetric"}}
    ]  # fmt: skip
    report["result"]["layers"] = report["base"]["layers"]
    read = Report.of(report)
    assert what_was_done(read).startswith("Quantized by gptq (4 bits, groups of 32, asymmetric)")
    assert "1. **Quantize** with `gptq`" in model_card(read)
    assert "perplexity, quantized" in {row.label for row in summary_rows(read)}


def test_block_strip_marks_the_removed(tmp_path: Path) -> None:
    report = made("no_verification")
    report["stages"] = [report["stages"][0] | {"log": {"dropped": [0, 29]}}]
    text = render_page(report, tmp_path)
    assert re.findall(r'<li class="gone">(\d+)</li>', text) == ["0", "29"]
    assert len(re.findall(r'<li class="kept">', text)) == 28


def test_figure_sizes_and_broken_pictures(tmp_path: Path) -> None:
    path = tmp_path / "loss_curve-2.png"
    path.write_bytes(PNG)
    figure = figure_of(path)
    assert (figure.width, figure.height) == (384, 192)
    assert figure.title == "Loss while healing"
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="not a PNG"):
        figure_of(path)


def test_values_as_text() -> None:
    assert value_text([1, 2.5, True, None, {"a": False}]) == "1, 2.5, yes, –, a: no"
    log = {"runner_up": 12, "margin": 0.0047, "map": [[1]], "name": "x", "none": None}
    assert scalars(log) == {"runner up": "12", "margin": "0.0047", "name": "x"}


def test_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    (tmp_path / "quality.png").write_bytes(PNG)
    (tmp_path / "speed.png").write_bytes(PNG)
    report = made("no_speedup")
    report["stages"] = []
    assert render_page(report, tmp_path) == render_page(report, tmp_path)


def test_what_stands_between_backticks_is_code_and_nothing_else_is_markup() -> None:
    assert ticked("run `a <b>` or <i>") == "run <code>a &lt;b&gt;</code> or &lt;i&gt;"
    assert ticked("one ` alone <i>") == "one ` alone &lt;i&gt;"


def test_white_on_the_colour_of_removed_blocks_can_be_read() -> None:
    """WCAG's contrast of text this small is 4.5 at least."""
    css = (Path(html.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    match = re.search(r"\.gone { background: #(\w{6}); color: #fff;", css)
    assert match is not None
    parts = [int(match[1][at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) >= 4.5
