"""What clients may ask, as the OpenAI API defines it, and the errors that they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from trainer.common.errors import one_line

T = TypeVar("T")

_List = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at the first wrong item: an error for each could take a thousand times the body's memory."""


class RequestError(Exception):
    """A request that cannot be served.

    Attributes:
        status: The HTTP status.
        body: The JSON body, as the OpenAI API has it.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}


class _Object(BaseModel):
    """An object whose keys are all known. Of those that are not, pydantic sees the first: each takes a kilobyte."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        unknown = next((name for name in body if name not in cls.model_fields), None)
        kept = {name: body[name] for name in cls.model_fields if name in body}
        return kept if unknown is None else kept | {unknown: body[unknown]}


class StreamOptions(_Object):
    """Options of streaming."""

    include_usage: bool = False


class _Request(_Object):
    """What both endpoints have. Fields of the API that would change an answer but are not implemented are refused."""

    model: StrictStr
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=0, description="Sample from this many of the most likely tokens; 0: all.")
    n: StrictInt = Field(1, ge=1, le=16)
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StrictStr | _List[StrictStr] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        null = [name for name in cls.model_fields if name in body and body[name] is None]
        return {name: value for name, value in body.items() if name not in null} if null else body

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(stops):
            raise RequestError("'stop' must be at most 4 sequences, none of them empty", "stop")
        return stops

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(_Request):
    """A request to /v1/completions."""

    prompt: StrictStr | _List[StrictStr] | _List[StrictInt] | _List[_List[StrictInt]] = ""
    max_tokens: StrictInt = Field(16, ge=1)
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or tokens."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given:
            raise RequestError("'prompt' is empty", "prompt")
        if isinstance(given[0], int):
            return [given]
        return list(given)


class TextPart(_Object):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


class Message(_Object):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | _List[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return the role and the text."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


def _text_only(format_: dict[str, Any]) -> dict[str, Any]:
    if format_ not in ({}, {"type": "text"}):
        raise PydanticCustomError("format", "Input should have the type 'text' and nothing else")
    return format_


class Chat(_Request):
    """A request to /v1/chat/completions."""

    messages: _List[Message] = Field(min_length=1)
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    response_format: Annotated[dict[str, Any], AfterValidator(_text_only)] | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def limit(self) -> int | None:
        """The largest number of new tokens; None: as many as the window holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def invalid(errors: Sequence[Any]) -> RequestError:
    """Return the error for a body that is not a valid request.

    Args:
        errors: What pydantic found.
    """
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = place[0] if place else None
    if not place and first["type"] == "model_attributes_type":
        return RequestError("The body must be a JSON object, with the header 'content-type: application/json'.")
    if first["type"] == "extra_forbidden":
        return RequestError(f"Unrecognized request argument supplied: {place[-1]}", place[-1], "unknown_parameter")
    if first["type"] == "json_invalid":
        return RequestError("We could not parse the JSON body of your request.")
    if first["type"] == "missing":
        return RequestError(f"you must provide a {place[-1] if place else 'body'} parameter", param)
    return RequestError(f"Invalid value for '{param}': {first['msg']}", param, "invalid_value")
