"""Where text or tokens come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Packing = Literal["packed", "windows", "stream"]


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
    column: Annotated[str, Field(description="The field that holds the text.")] = "text"
    packing: Annotated[
        Packing | None,
        Field(
            description="`packed`: documents joined by the end-of-text token and cut; `windows`: "
            "one random window from each document that is longer than `length` (Wanda, SparseGPT, "
            "GBLM); `stream`: joined by blank lines, windows in order (perplexity protocol). Null: "
            "`stream` for the data of `verify.quality.perplexity`, else `packed`."
        ),
    ] = None


class HubDataset(_Text):
    """A dataset of the Hub, streamed through `datasets`."""

    dataset: Annotated[str, Field(min_length=1, description="Hub id, such as `allenai/c4`.")]
    config: Annotated[str | None, Field(description="Configuration, such as `en`.")] = None
    split: Annotated[str, Field(description="Split.")] = "train"
    revision: Annotated[str | None, Field(description="Commit, tag or branch.")] = None


class LocalText(_Text):
    """Text, JSON-lines or Parquet files below the data root."""

    files: Annotated[
        tuple[str, ...],
        Field(min_length=1, description="Relative paths or globs: .txt .jsonl .parquet"),
    ]


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
