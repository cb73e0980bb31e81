"""The real `hf` command, with a folder in place of GitHub: `with_github.py FOLDER hf-arguments…`.

Every request that would go to GitHub is answered from the folder, whose files stand for those at
HEAD of `me/hf-prune`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub.cli import extensions, hf


def main() -> None:
    folder = Path(sys.argv.pop(1))

    def answered(method: str, url: str, **_: Any) -> httpx2.Response:
        request = httpx2.Request(method, url)
        place = urlsplit(url)
        name = place.path.removeprefix("/me/hf-prune").removeprefix("/HEAD/")
        if place.path.startswith("/me/hf-prune.git/"):
            return httpx2.Response(200, text="0" * 4 + "a" * 40 + " HEAD\0", request=request)
        if place.hostname == "github.com" and not name:
            return httpx2.Response(200, request=request)
        if place.hostname == "raw.githubusercontent.com" and (folder / name).is_file():
            data = (folder / name).read_bytes()
            return httpx2.Response(200, content=data, request=request)
        missing = httpx2.Response(404, request=request)
        return missing.raise_for_status()

    extensions._github_request = answered
    hf.main()


if __name__ == "__main__":
    main()
