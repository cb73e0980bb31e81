"""A bill of materials of a result, as CycloneDX 1.6 has it for models: what it was made from.

Everything in it is in the result already (lock, config, list of files), so that the same result
gives the same bytes. https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from prune_export.errors import PublishError
from prune_export.store import sha256_of_file
from prune_export.system.files import REPORT_BYTES, read_json_object
from prune_export.system.written import LOCK

BILL: Final = "bom.cdx.json"
_SPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6.schema.json")


def write_bill(directory: Path, files: Sequence[str]) -> Path:
    """Writes `bom.cdx.json` into a result directory, over the files that are published.

    Raises:
        PublishError: there is no lock, or it is none of this tool's.
    """
    file = directory / BILL
    text = json.dumps(bill_of_materials(directory, files), indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def bill_of_materials(directory: Path, files: Sequence[str]) -> dict[str, Any]:
    """The bill as JSON: the model with its base and card, data, software, and files with hashes.

    Raises:
        PublishError: as `write_bill`.
    """
    lock = read_json_object(directory / LOCK, "a lock", REPORT_BYTES, error=PublishError)
    config = read_json_object(directory / "config.json", "a config", error=PublishError)
    base, data, versions = (_mapping(lock, key) for key in ("base", "data", "versions"))
    if not base or not versions:
        raise PublishError(
            str(directory / LOCK), "does not say what the model was made from",
            "publish the whole `out/` directory of a run",
        )  # fmt: skip
    contents = [_file(directory, name) for name in sorted(files) if name != BILL]
    identity = json.dumps([lock.get("recipe_sha256"), contents], sort_keys=True)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, identity)}",
        "version": 1,
        "metadata": {
            "tools": {"components": [_software(*one) for one in sorted(versions.items())]},
            "component": _model(lock, config, base, data),
        },
        "components": [*_sets(data), *contents],
        "dependencies": [
            {"ref": "model", "dependsOn": [f"data:{name}" for name in sorted(data)]},
        ],
    }  # fmt: skip


def _model(
    lock: Mapping[str, Any], config: Mapping[str, Any], base: Mapping[str, Any], data: Any
) -> dict[str, Any]:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "model"
    ancestor = {"type": "machine-learning-model", "name": str(base.get("model"))}
    if base.get("revision"):
        ancestor["version"] = str(base["revision"])
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": f"{base.get('model')}, pruned",
        "version": str(lock.get("recipe_sha256", ""))[:12],
        "description": "Made by prune_export from prune_recipe.yaml, which stands beside it.",
        "pedigree": {
            "ancestors": [ancestor],
            "notes": "stages and engines: " + ", ".join(sorted(_mapping(lock, "artifacts"))),
        },
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": str(config.get("model_type", "")),
                "modelArchitecture": str(name),
                "datasets": [{"ref": f"data:{one}"} for one in sorted(data)],
            }
        },
    }


def _sets(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name in sorted(data):
        about = data[name] if isinstance(data[name], Mapping) else {}
        entry = {"type": "data", "bom-ref": f"data:{name}", "name": name,
                 "data": [{"type": "dataset", "name": name}]}  # fmt: skip
        print_ = about.get("fingerprint")
        if isinstance(print_, str) and len(print_) == 64:
            entry["hashes"] = [{"alg": "SHA-256", "content": print_}]
        found.append(entry)
    return found


def _software(name: str, version: Any) -> dict[str, Any]:
    package = name.replace("_", "-")
    return {"type": "application", "bom-ref": f"tool:{package}", "name": package,
            "version": str(version), "purl": f"pkg:pypi/{package}@{version}"}  # fmt: skip


def _file(directory: Path, name: str) -> dict[str, Any]:
    digest = sha256_of_file(directory / name)
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}
