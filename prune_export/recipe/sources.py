"""The kinds of data source: a Hub dataset, local text, saved tokens, what a model says."""

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


DENSE: Final = "dense"
"""What speaks in `generated: {from: dense}`: the model that the recipe starts from."""


class Generation(Frozen):
    """Who says it, to which prompts, and how it is drawn."""

    # `from` is a word of Python's.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True
    )

    speaker: Annotated[
        str,
        Field(
            alias="from",
            min_length=1,
            description="`dense`, the model that the recipe starts from; the `http(s)://…/v1` of a "
            "server that speaks OpenAI's protocol; or a directory below the data root, of a model "
            "or of an engine in a result. Prompts are sent to no other place, and to a server only "
            "if the environment's `PRUNE_EXPORT_SEND_TO` names its address.",
        ),
    ] = DENSE
    model: Annotated[
        str | None, Field(min_length=1, description="Of a server: which model it is asked for.")
    ] = None
    prompts: Annotated[
        Literal["bundled", "none"] | tuple[Annotated[str, Field(min_length=1)], ...],
        Field(
            min_length=1,
            description="`bundled` are this package's; `none` draws free samples, which begin as "
            "any text does; or a list of files below the data root.",
        ),
    ] = "bundled"
    column: Annotated[
        str,
        Field(
            description="The field that holds a prompt. Conversations in a field `messages` are "
            "answered up to the last message that is not the assistant's."
        ),
    ] = "prompt"
    template: Annotated[
        Literal["auto"] | bool,
        Field(
            description="Whether a prompt is put as a message, by the chat template; `auto` does "
            "where the tokenizer has one, and on a server always. Else it is gone on with."
        ),
    ] = "auto"
    answers: Annotated[
        int | None,
        Field(
            gt=0,
            description="Number of answers. Null: of a server one for each prompt, else as many as "
            "the windows take, prompts again and again.",
        ),
    ] = None
    new_tokens: Annotated[int, Field(gt=0, description="Tokens of an answer, at most.")] = 256
    temperature: Annotated[
        float, Field(ge=0, le=10, description="Of the drawing; 0 takes the likeliest token.")
    ] = 1.0
    top_p: Annotated[
        float,
        Field(gt=0, le=1, description="Draw from the likeliest tokens that have so much together."),
    ] = 1.0
    seed: Annotated[int, Field(ge=0, description="Seed of the drawing.")] = 0
    # What follows changes no answer, and so no artifact.
    attempts: Annotated[
        int, Field(ge=1, le=100, description="Of a server: attempts at each answer.")
    ] = 5
    seconds: Annotated[
        float,
        Field(gt=0, le=86400, description="Of a server: how long one attempt may take."),
    ] = 120.0
    at_once: Annotated[
        int, Field(ge=1, le=64, description="Of a server: requests that run at once.")
    ] = 4
    most_tokens: Annotated[
        int | None,
        Field(
            gt=0,
            description="Of a server: prompt and answer tokens, as it counts them, after which it "
            "is asked no more, and the run stops; what was answered is kept.",
        ),
    ] = None

    @property
    def is_server(self) -> bool:
        """Whether a server says it."""
        return "://" in self.speaker

    def drawing(self) -> dict[str, Any]:
        """The keys that decide what is said, apart from limits; what names an artifact."""
        limits = {"attempts", "seconds", "at_once", "most_tokens"}
        return self.model_dump(mode="json", exclude=limits)

    def model_post_init(self, context: Any) -> None:
        del context
        if self.is_server:
            if self.model is None:
                raise ValueError("a server is to be asked for a `model`, and none is named")
            if self.prompts == "none":
                raise ValueError("a server takes prompts; `prompts: none` is for `from: dense`")
        elif self.model is not None:
            raise ValueError("`model` is for a server, and `from` is none")


class Generated(_Windows):
    """What a model says: self-data, or another model's answers to train on."""

    generated: Annotated[Generation, Field(description="Who says what; its keys are below.")]
    packing: Annotated[
        Packing | None,
        Field(description="As of text; `stream` keeps the order of the answers."),
    ] = None
    loss_on: Annotated[
        Literal["answers", "all"],
        Field(
            description="What healing trains on and perplexity counts: the `answers`, or prompts "
            "too."
        ),
    ] = "answers"

    def model_post_init(self, context: Any) -> None:
        del context
        open_ended = self.generated.answers is None and not self.generated.is_server
        if open_ended and self.samples is None:
            raise ValueError("says neither `samples` nor `answers`, so it would never end")


TextSource = HubDataset | LocalText | TokenFile
"""What there is before a model says anything."""

Source = TextSource | Generated
SOURCES: dict[str, type[HubDataset] | type[LocalText] | type[TokenFile] | type[Generated]] = {
    "dataset": HubDataset,
    "files": LocalText,
    "tokens": TokenFile,
    "generated": Generated,
}
"""The key that tells each kind of source, and its schema."""
