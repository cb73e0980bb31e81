"""Finds the small files beside the weights to carry along, and refuses unsafe ones.

They are copied into every result and published with it, so none may be a link to a file that is
not the model's. The Hub's cache is made of links, and they stay inside their own repository there.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Final

from prune_export.errors import CheckpointError
from prune_export.system.cached import is_within
from prune_export.system.files import CARD_BYTES, JSON_BYTES, TOKENIZER_BYTES, open_regular

SIDE_NAMES: Final = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer.model.v3", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json",
    "vocab.txt",
})  # fmt: skip
SIDE_STEMS: Final = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")

_SETTINGS: Final = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer_config.json", "video_preprocessor_config.json",
})  # fmt: skip
"""Settings; the others of `SIDE_NAMES` are vocabularies."""

ADAPTER: Final = "adapter_config.json"
MERGE: Final = (
    "merge it first, where you trust it: `AutoPeftModelForCausalLM.from_pretrained(DIRECTORY)"
    ".merge_and_unload().save_pretrained(TARGET)` with peft; or remove it to prune the model alone"
)


def is_adapter(name: str) -> bool:
    """Whether a file of this name belongs to a PEFT adapter."""
    return name == ADAPTER or name.startswith("adapter_model.")


def side_files(path: Path) -> tuple[Path, ...]:
    """Files of a model directory to carry along, sorted, each a regular file of the model's own.

    Raises:
        CheckpointError: one is a link out of the directory, no regular file, or far too long.
    """
    return tuple(
        found for found in sorted(path.iterdir()) if _is_side(found) and _is_sound(path, found)
    )


def refuse_adapter(path: Path) -> None:
    """Refuses a model directory with an adapter in it: the model would be one of two.

    Raises:
        CheckpointError: it holds `adapter_config.json` or an adapter's weights.
    """
    found = sorted(file.name for file in path.iterdir() if is_adapter(file.name))
    if found:
        raise CheckpointError(
            str(path / found[0]),
            "is a PEFT adapter beside the model's own weights: which of the two models is meant?",
            MERGE,
        )


def refuse_stray_link(directory: Path, file: Path) -> None:
    """Refuses a file that lies, links followed, neither in `directory` nor in its Hub cache.

    Raises:
        CheckpointError: naming the link and its target; also for a link to nothing, or in a circle.
    """
    home = directory.resolve()
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError is a circle of links, in Python 3.11 and 3.12
        raise CheckpointError(
            str(file),
            "is a link to nothing, or in a circle",
            "put the file itself at this place, or remove the link",
        ) from None
    if is_within(file, directory):
        return
    if home.parent.name == "snapshots":
        raise CheckpointError(
            str(file),
            f"is a link to {real}, which is not in the cache of this model",
            "fetch the model again (`hf download`)",
        )
    raise CheckpointError(
        str(file),
        f"is a link to {real}, outside the model's directory: it would be copied into the result",
        "put the file itself at this place, or remove the link",
    )


def _is_side(file: Path) -> bool:
    if file.name in SIDE_NAMES:
        return True
    if not file.name.upper().startswith(SIDE_STEMS):
        return False
    # LICENSES/ is a folder that some projects have; it stays behind, as all folders do.
    return file.is_symlink() or not stat.S_ISDIR(file.lstat().st_mode)


def _is_sound(directory: Path, file: Path) -> bool:
    if file.is_symlink():
        refuse_stray_link(directory, file)
    if file.name in SIDE_NAMES:
        limit = JSON_BYTES if file.name in _SETTINGS else TOKENIZER_BYTES
        what = "a file of the tokenizer or of settings"
    else:
        limit, what = CARD_BYTES, "a licence"
    open_regular(file, limit, what).close()
    return True
