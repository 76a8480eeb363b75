"""What a chat request may say, in OpenAI's words; whatever is not listed is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question
from edgevlm.engines.serving.data_url import image_file
from edgevlm.engines.serving.limits import Limits
from edgevlm.toolkit.errors import InputError


class Strict(BaseModel):
    """A body, or a part of one, with nothing unknown in it."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """An image as a data URL, such as data:image/png;base64,...; other addresses are refused."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[Union[TextPart, ImagePart], Field(discriminator="type")]


class UserMessage(Strict):
    """A question: text, or parts. Its images stand before its text."""

    role: Literal["user"]
    content: Union[str, list[Part]]
    name: Union[str, None] = None


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Union[str, list[TextPart]]
    name: Union[str, None] = None
    refusal: None = None


class SystemMessage(Strict):
    """Instructions for the whole conversation. Their text stands in front of the first question:
    the models' templates have a system text of their own, with which they were trained.
    """

    role: Literal["system", "developer"]
    content: Union[str, list[TextPart]]
    name: Union[str, None] = None


Turn = Union[UserMessage, AssistantMessage]
Message = Annotated[
    Union[SystemMessage, UserMessage, AssistantMessage], Field(discriminator="role")
]


class StreamOptions(Strict):
    """include_usage: whether a last chunk states the tokens."""

    include_usage: bool = False


class ResponseFormat(Strict):
    """Text; there is no grammar that would force an answer into JSON."""

    type: Literal["text"]


class ChatRequest(Strict):
    """The body of /v1/chat/completions. temperature: 0, greedy, unless it is given."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: Union[str, None] = None
    stream: bool = False
    stream_options: Union[StreamOptions, None] = None
    max_tokens: Union[Annotated[int, Field(ge=1)], None] = None
    max_completion_tokens: Union[Annotated[int, Field(ge=1)], None] = None
    temperature: Union[Annotated[float, Field(ge=0, le=2)], None] = None
    top_p: Union[Annotated[float, Field(gt=0, le=1)], None] = None
    top_k: Union[Annotated[int, Field(ge=0)], None] = None
    seed: Union[Annotated[int, Field(ge=0, lt=1 << 63)], None] = None
    stop: Union[str, Annotated[list[str], Field(max_length=16)], None] = None
    logprobs: Union[bool, None] = None
    top_logprobs: Union[Annotated[int, Field(ge=0, le=20)], None] = None
    n: Union[Literal[1], None] = None
    response_format: Union[ResponseFormat, None] = None
    frequency_penalty: Union[Annotated[float, Field(ge=0, le=0)], None] = None
    presence_penalty: Union[Annotated[float, Field(ge=0, le=0)], None] = None
    user: Union[str, None] = None
    metadata: Union[dict[str, str], None] = None


@dataclass(frozen=True)
class Asked:
    """A request that can be answered. logprobs: as Job takes it."""

    question: Question
    model: str | None
    stream: bool
    usage: bool
    logprobs: int | None


def read(body: bytes, limits: Limits) -> Asked:
    """The question in a body. Raises InputError that names the field."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as odd:
        raise InputError(said(odd.errors(include_url=False, include_context=False)[0])) from None
    instructions, conversation = _divided(request.messages)
    _check(request, conversation, len(request.messages) - len(conversation))
    turns, images, image_turns = _turns(conversation, len(instructions), limits)
    turns[0] = "\n\n".join([*instructions, turns[0]])
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    question = Question(
        turns[-1],
        images,
        _max_tokens(request, limits),
        _sampling(request),
        stop=[text for text in stop if text],
        history=turns[:-1],
        literal=True,
        image_turns=image_turns,
    )
    usage = request.stream_options is not None and request.stream_options.include_usage
    return Asked(question, request.model, request.stream, usage, logprobs)


def said(error: Any) -> str:
    """Which field is wrong, and how, by the first of pydantic's errors."""
    where = ".".join(str(step) for step in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown, or not implemented by this server"
    if error["loc"][:1] == ("response_format",):
        return f"{where}: only text is answered: no grammar forces an answer into JSON"
    return f"{where or 'the body'}: {error['msg']}"


def _divided(messages: Sequence[Message]) -> tuple[list[str], list[Turn]]:
    """The texts of the system messages in front, and what follows them."""
    instructions, turns = list[str](), list[Turn]()
    for number, message in enumerate(messages):
        if not isinstance(message, SystemMessage):
            turns.append(message)
        elif turns:
            raise InputError(
                f"messages.{number}.role: system messages stand in front of all others"
            )
        else:
            instructions.append(_text(message.content))
    return instructions, turns


def _text(content: str | Sequence[Part]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def _check(request: ChatRequest, conversation: Sequence[Turn], before: int) -> None:
    """before: how many system messages there are."""
    if request.top_logprobs and not request.logprobs:
        raise InputError("top_logprobs: needs logprobs to be true")
    if request.stream_options is not None and not request.stream:
        raise InputError("stream_options: needs stream to be true")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise InputError("max_tokens: give it or max_completion_tokens, not both")
    for number, message in enumerate(conversation):
        if message.role != ("assistant" if number % 2 else "user"):
            raise InputError(f"messages.{before + number}.role: user and assistant must alternate")
    if len(conversation) % 2 == 0:
        raise InputError("messages: the last one must be the user's")


def _max_tokens(request: ChatRequest, limits: Limits) -> int:
    asked = request.max_completion_tokens or request.max_tokens
    if asked is not None and asked > limits.max_tokens:
        raise InputError(f"max_tokens: {asked}, this server answers with {limits.max_tokens}")
    return asked or limits.max_tokens


def _sampling(request: ChatRequest) -> Sampling:
    temperature = request.temperature or 0.0
    if not temperature:  # what narrows the choice has no effect on the likeliest token
        return Sampling(seed=request.seed)
    return Sampling(temperature, request.top_k or 0, request.top_p or 1.0, request.seed)


def _turns(
    messages: Sequence[Turn], before: int, limits: Limits
) -> tuple[list[str], list[bytes], list[int]]:
    """Texts by turn, images, and the turn of each image; before: messages in front of these."""
    turns, images, image_turns = list[str](), list[bytes](), list[int]()
    for number, message in enumerate(messages):
        parts = message.content
        turns.append(_text(parts))
        for place, part in enumerate([] if isinstance(parts, str) else parts):
            if isinstance(part, ImagePart):
                where = f"messages.{before + number}.content.{place}.image_url.url"
                images.append(image_file(part.image_url.url, where, limits))
                image_turns.append(number)
                if len(images) > limits.images:
                    raise InputError(f"{where}: more than {limits.images} images")
    return turns, images, image_turns
