"""What a client may ask for: OpenAI's request bodies, checked; what is not done is refused.

Keys that would change the answer and are not implemented are an error, not silence. Keys that only
describe the request (`user`, `metadata`) may be there.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MOST_STOPS: Final = 16
LONGEST_STOP: Final = 1000
"""Characters: how much text may be held back for a stop string."""
MOST_PROMPTS: Final = 128

_Unused = Annotated[None, BeforeValidator(lambda value: _unused(value))]


def _unused(value: Any) -> None:
    if value not in (None, 0, 1, [], {}, "none", "auto", False):
        raise ValueError("is not supported by this server")


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False


class _Common(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    presence_penalty: float | None = Field(default=0, ge=0, le=0)
    frequency_penalty: float | None = Field(default=0, ge=0, le=0)
    logit_bias: _Unused = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if value is not None}

    @model_validator(mode="after")
    def _few_stops(self) -> Any:
        if len(self.stops) > MOST_STOPS:
            raise ValueError(f"more than {MOST_STOPS} stop strings")
        if any(len(one) > LONGEST_STOP for one in self.stops):
            raise ValueError(f"a stop string of more than {LONGEST_STOP} characters")
        return self


class CompletionRequest(_Common):
    """The body of `/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False
    best_of: Literal[1] | None = 1
    suffix: _Unused = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        found = self.prompt
        if isinstance(found, str):
            return [found]
        if found and all(isinstance(one, int) for one in found):
            return [[int(one) for one in found if isinstance(one, int)]]
        return [one for one in found if not isinstance(one, int)]

    @model_validator(mode="after")
    def _some_prompts(self) -> Any:
        if not 0 < len(self.prompts) <= MOST_PROMPTS:
            raise ValueError(f"`prompt` holds {len(self.prompts)} prompts, not 1 to {MOST_PROMPTS}")
        return self


class Part(BaseModel):
    """A part of a message's content; text alone."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        """Its content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_Common):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: _Unused = None
    tool_choice: _Unused = None
    functions: _Unused = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _plain_text(self) -> Any:
        if self.response_format and self.response_format.get("type") != "text":
            raise ValueError("`response_format` is not supported by this server")
        return self


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The key and the words of the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), str(first["msg"])
