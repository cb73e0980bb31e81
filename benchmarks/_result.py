"""Keeps what a benchmark measured, with the machine and the versions that it was measured on."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_export.machine import describe

RESULTS = Path(__file__).parent / "results"


def save(name: str, payload: Mapping[str, Any], *, results: Path = RESULTS) -> Path:
    """Writes `<date>-<machine>-<name>.json` with `payload`, the date and the machine; its path."""
    machine = describe()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    words = re.findall(r"[a-z0-9]+", (machine.get("gpu") or machine["processor"]).lower())
    slug = "-".join([*words[:4], f"{machine['cores']}cores"])
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"{date}-{slug}-{name}.json"
    content = {"benchmark": name, "date": date, **payload, "machine": machine}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file
