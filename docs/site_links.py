"""Builds the site from files whose links work on the repository's page: README is the index.

A link that leads out of docs/ (to recorded results, say) leads to a copy of that file in the site's
`repository/`. A link to nothing is a warning, which `--strict` makes an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from properdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
"""Pages of the site that are not in docs/."""
_LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside docs/, and what any page links to outside it."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for file in list(files.documentation_pages()):
        home = _home(file.src_uri)
        for _, link in _LINK.findall(Path(str(file.abs_src_path)).read_text(encoding="utf-8")):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
            copy = f"repository/{target}.txt" if target.endswith(".md") else f"repository/{target}"
            if _is_outside(target) and files.get_file_from_path(copy) is None:
                text = (ROOT / target).read_bytes()
                files.append(File.generated(config, copy, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page's text with the links that hold in the site."""
    home, here = _home(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def led(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), found[2]))
        if target in PAGES.values():
            place = next(page for page, source in PAGES.items() if source == target)
        elif target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif _is_outside(target):
            place = f"repository/{target}.txt" if target.endswith(".md") else f"repository/{target}"
        else:  # a link to nothing, which the generator tells of
            return found[0]
        return found[1] + posixpath.relpath(place, here or ".")

    return _LINK.sub(led, markdown)


def _home(page: str) -> str:
    """The file in the repository that a page is made of."""
    return PAGES.get(page, f"docs/{page}")


def _is_outside(target: str) -> bool:
    inside = target.startswith("docs/") or target in PAGES.values()
    return not inside and not target.startswith("..") and (ROOT / target).is_file()
