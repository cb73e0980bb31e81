"""Writes a tokenizer into a GGUF file: tokens, merges, special tokens, the chat template.

llama.cpp splits text by rules of its own, chosen by a name (`tokenizer.ggml.pre`). A tokenizer is
written only where its rules are those behind a name; a wrong name would make other tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from prune_export.errors import PlanError

_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_RULES: Final = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


def add_vocabulary(writer: Any, directory: Path, tokenizer: Any, size: int) -> None:
    """Adds the vocabulary of a directory to a `gguf.GGUFWriter`, padded to `size` tokens.

    Raises:
        PlanError: it is no byte-level BPE, or splits text by rules that llama.cpp has no name for.
    """
    import gguf

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise PlanError(
            str(file), "is missing: only byte-level BPE of tokenizer.json is written as GGUF",
            "use llama.cpp's own converter for a SentencePiece tokenizer",
        )  # fmt: skip
    raw = json.loads(file.read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules_of(raw, file))
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, number in tokenizer.get_vocab().items():
        if number < size:
            tokens[number], types[number] = token, int(gguf.TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        if number < size:
            tokens[number] = added.content
            kind = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
            types[number] = int(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=size)
    special.add_special_token["bos"] = _begins(tokenizer)
    special.add_to_gguf(writer, quiet=True)


def rules_of(raw: Any, file: Path) -> str:
    """llama.cpp's name for the rules by which a tokenizer.json splits text.

    Raises:
        PlanError: it has none.
    """
    model = raw.get("model") or {}
    before = raw.get("pre_tokenizer") or {}
    sequence = before.get("type") == "Sequence"
    parts: list[Any] = list(before.get("pretokenizers") or []) if sequence else [before]
    kinds = [part.get("type") for part in parts]
    name = None
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            name = "smollm" if parts[1].get("use_regex", True) else None
        elif kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
            name = _RULES.get(str((parts[0].get("pattern") or {}).get("Regex")))
    if name is None:
        raise PlanError(
            f"{file}  pre_tokenizer",
            f"splits text by rules ({', '.join(map(str, kinds))}) that are not known here by "
            "llama.cpp's name",
            "use llama.cpp's own converter, which may know them",
        )
    return name


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer puts the token of the beginning before a text."""
    ids = tokenizer("a")["input_ids"]
    return bool(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
