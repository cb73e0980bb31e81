"""Loads a model directory with transformers, in one place: its data only, never its code.

Every `from_pretrained` of this package is here, or says the same by itself: no network, no code of
the directory's (`trust_remote_code=False`, so that transformers neither runs it nor asks), and no
PEFT adapter beside the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from prune_export.arch.wrappers import wrapper_of
from prune_export.checkpoint.config import read_json
from prune_export.checkpoint.reader import Checkpoint
from prune_export.checkpoint.side import side_files
from prune_export.errors import CheckpointError
from prune_export.modeling import register
from prune_export.system.files import is_regular, read_json_object

NO_ADAPTER: Final[Mapping[str, str]] = {"subfolder": "\0"}
"""Where transformers is to look for an adapter: in a folder whose name no folder can have.

It has no argument that turns its PEFT integration off; `adapter_kwargs` says where to look.
"""


def load_model(path: Path | str, **options: Any) -> Any:
    """Loads a directory's causal language model, without an adapter; `options` go to transformers.

    Of a larger model (of images and text) the language model alone is loaded.

    Raises:
        OSError, ValueError: as transformers has them, for what it cannot load.
    """
    from transformers import AutoModelForCausalLM

    register()
    found = _wrapped(Path(path))
    if found is not None:
        options = _as_text(found) | options
    with _silent("transformers.modeling_utils") if found else nullcontext():
        return AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            adapter_kwargs=dict(NO_ADAPTER),
            **options,
        )


def load_whole_model(path: Path | str, **options: Any) -> Any:
    """Loads a directory's model as `load_model` does; of a larger one, all of it.

    Raises:
        OSError, ValueError: as transformers has them, for what it cannot load.
    """
    if _wrapped(Path(path)) is None:
        return load_model(path, **options)
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        path,
        local_files_only=True,
        trust_remote_code=False,
        adapter_kwargs=dict(NO_ADAPTER),
        **options,
    )


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Keeps a logger from its warnings: that tensors of the other parts are left alone is meant."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _wrapped(path: Path) -> Checkpoint | None:
    """Opens a checkpoint of a larger model; None for a plain one."""
    if not is_regular(path / "config.json") or wrapper_of(read_json(path / "config.json")) is None:
        return None
    opened = Checkpoint.open(path)
    return opened if opened.wrapped is not None else None


def _as_text(opened: Checkpoint) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load the language model of a larger model alone."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert opened.wrapped is not None
    full = opened.full_config()
    config = CONFIG_MAPPING[full["model_type"]].from_dict(full)
    return {"config": config, "key_mapping": opened.wrapped.renaming()}


def load_config(path: Path | str) -> Any:
    """Loads a directory's configuration, as an object of transformers' own class.

    Of a larger model (of images and text) it is that of the language model alone.

    Raises:
        OSError, ValueError: as transformers has them.
    """
    from transformers import AutoConfig

    register()
    if (found := _wrapped(Path(path))) is not None:
        return _as_text(found)["config"]
    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_tokenizer(directory: Path, **options: Any) -> Any:
    """Loads a directory's tokenizer; one that brings code, from its tokenizer.json alone.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is code and nothing else.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    side_files(directory)  # refuses what is no regular file, or far too long
    settings = directory / "tokenizer_config.json"
    said = read_json_object(settings, "a tokenizer's settings") if is_regular(settings) else {}
    register()
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:
        # tokenizers raises bare Exception on a broken file; AutoTokenizer many kinds.
        problem = error
    if "auto_map" in said and is_regular(directory / "tokenizer.json"):
        try:
            return PreTrainedTokenizerFast.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:
            problem = error
    if "auto_map" in said:
        raise CheckpointError(
            f"{settings}  auto_map",
            "the tokenizer is Python code beside the model, which is never run",
            "make a tokenizer.json of it where you trust it "
            "(`transformers.convert_slow_tokenizer`), and take `auto_map` out",
        ) from problem
    reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    raise CheckpointError(
        f"{directory}  tokenizer",
        f"cannot be read: {reason:.300}",
        "copy tokenizer.json and tokenizer_config.json of the model into its directory",
    ) from problem


def load_ends(directory: Path) -> frozenset[int]:
    """Reads the end-of-sequence tokens of the generation config, if there is one.

    Raises:
        CheckpointError: the file is not JSON, or holds something else than tokens there.
    """
    file = directory / "generation_config.json"
    if not is_regular(file):
        return frozenset()
    ends = read_json_object(file, "a generation config").get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise CheckpointError(
            f"{file}  eos_token_id",
            f"got {ends!r:.60}, expected a token's number, or a list of them",
            "correct the value, or remove it",
        )
    return frozenset(listed)
