"""The docs as a site: links hold there and on the repository's page, and one to nothing fails."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("properdocs", reason="properdocs is not installed (the extra `docs`)")

ROOT = Path(__file__).parents[1]


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="architectures/"' in front
    assert 'src="img/demo.png"' in front
    linked = re.search(r"\((benchmarks/results/[^)]+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert linked is not None
    report = linked[1]
    assert f'href="repository/{report}"' in front
    assert (tmp_path / "repository" / report).read_bytes() == (ROOT / report).read_bytes()
    assert 'href="../security/"' in (tmp_path / "outside-data/index.html").read_text("utf-8")


def test_a_link_to_nothing_fails(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "examples").mkdir()
    for file in [*ROOT.glob("*.md"), ROOT / "properdocs.yml"]:
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "examples" / "README.md", tmp_path / "examples")
    (tmp_path / "docs" / "new.md").write_text("# New\n[a](gone.md) [b](../gone.py) [c](#gone)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for link in ("gone.md", "../gone.py", "#gone"):
        assert f"'new.md' contains a link '{link}'" in done.stderr
