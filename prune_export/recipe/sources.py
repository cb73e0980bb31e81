"""The kinds of data source: a Hub dataset, local text, saved tokens."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Packing = Literal["packed", "windows", "stream"]

CONVERSATIONS: Final = "messages"
"""The column that holds conversations, where its values are lists."""

_NO_TEXT: Final = frozenset(
    {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "mbcs", "oem"}
)
"""Codecs of Python that are no encoding of files, or not of every machine."""


def _encoding(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        # An encoding of text, and not one of the codecs that turn bytes into bytes.
        "".encode(name)
        known = codecs.lookup(name).name.replace("_", "-")
    except (LookupError, ValueError):
        known = ""
    if not known or known in _NO_TEXT:
        raise ValueError("not an encoding of text that Python knows, such as `utf-16` or `cp1252`")
    return name


class Frozen(BaseModel):
    """A schema that refuses unknown keys and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Windows(Frozen):
    samples: Annotated[
        int | None, Field(gt=0, description="Number of windows; null takes all.")
    ] = None
    length: Annotated[int, Field(gt=1, description="Tokens in a window.")] = 2048
    seed: Annotated[int, Field(ge=0, description="Seed of the choice of windows.")] = 0


class _Text(_Windows):
    column: Annotated[
        str,
        Field(
            description="The field that holds the text. Lists of `role` and `content` in a field "
            "`messages` are conversations: the tokenizer's chat template is applied."
        ),
    ] = "text"
    packing: Annotated[
        Packing | None,
        Field(
            description="`packed`: documents joined by the end-of-text token and cut; `windows`: "
            "one random window from each document that is longer than `length` (Wanda, SparseGPT, "
            "GBLM); `stream`: joined by blank lines, windows in order (perplexity protocol). Null: "
            "`stream` for the data of `verify.quality.perplexity`, else `packed`."
        ),
    ] = None
    # Keys of later versions are left out where they have their defaults: they are part of what
    # names an artifact, and one that is there already is to be found.
    prefix: Annotated[
        Literal["every", "first"],
        Field(
            description="What the tokenizer puts before any text (such as BOS) begins `every` "
            "window of a stream, or only the `first`: the protocol of the papers, by which models "
            "that were trained with it are judged too badly. Windows of other packings, and of "
            "conversations, always begin with it.",
            exclude_if=lambda value: value == "every",
        ),
    ] = "every"
    loss_on: Annotated[
        Literal["all", "assistant"],
        Field(
            description="Which tokens of conversations healing trains on and perplexity counts: "
            "`all`, or what the `assistant` says. Calibration reads all.",
            exclude_if=lambda value: value == "all",
        ),
    ] = "all"


class HubDataset(_Text):
    """A dataset of the Hub, streamed through `datasets`."""

    dataset: Annotated[str, Field(min_length=1, description="Hub id, such as `allenai/c4`.")]
    config: Annotated[str | None, Field(description="Configuration, such as `en`.")] = None
    split: Annotated[str, Field(description="Split.")] = "train"
    revision: Annotated[str | None, Field(description="Commit, tag or branch.")] = None


class Part(Frozen):
    """A share of the documents of some files, in an order that a seed decides.

    Shares that do not overlap have no document in common.
    """

    start: Annotated[float, Field(ge=0, lt=1, description="Where the share begins, from 0 to 1.")]
    stop: Annotated[float, Field(gt=0, le=1, description="Where it ends, from 0 to 1.")]
    seed: Annotated[int, Field(ge=0, description="Seed of the order.")] = 0

    def model_post_init(self, context: Any) -> None:
        del context
        if self.stop <= self.start:
            raise ValueError(f"ends at {self.stop:g}, expected more than {self.start:g}")


class LocalText(_Text):
    """Text, JSON-lines or Parquet files below the data root."""

    files: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="Relative paths or globs: .txt .md .jsonl .json .parquet"),
    ]
    part: Annotated[
        Part | None,
        Field(
            description="The share of the documents to read, so that several sources may split "
            "the same files; a long text is cut into contiguous spans. Null reads all.",
            exclude_if=lambda value: value is None,
        ),
    ] = None
    encoding: Annotated[
        str | None,
        AfterValidator(_encoding),
        Field(
            description="Of text files, as Python names it (`utf-16`, `cp1252`); null is UTF-8.",
            exclude_if=lambda value: value is None,
        ),
    ] = None


class TokenFile(_Windows):
    """Saved token ids, as this tool writes them."""

    tokens: Annotated[str, Field(min_length=1, description="A relative path to a .safetensors.")]


Source = HubDataset | LocalText | TokenFile
SOURCES: dict[str, type[HubDataset] | type[LocalText] | type[TokenFile]] = {
    "dataset": HubDataset,
    "files": LocalText,
    "tokens": TokenFile,
}
"""The key that tells each kind of source, and its schema."""
