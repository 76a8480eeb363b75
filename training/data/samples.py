"""Raw samples: a conversation and its images, as any kind of data set states them.

Three kinds of conversation are read: LLaVA's `conversations` ({from: human | gpt, value}), the
`messages` of chat models ({role, content}, the content a text or a list of parts), and `texts`
({user, assistant}), whose images stand before the first question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgevlm.training.data.broken import STRUCTURE, BrokenSample

IMAGE = "<image>"
USER, ASSISTANT = "user", "assistant"
_ROLES = {"human": USER, "gpt": ASSISTANT}
_CONVERSATIONS = ("conversations", "messages", "conversation", "texts")
_IMAGES = ("image", "images")
ImageFile = Path | bytes
Turn = tuple[str, str]


@dataclass(frozen=True)
class RawSample:
    """One sample as it is stored.

    images: files, or their bytes. turns: role and text; "user" and "assistant" whatever the data
    set calls them, other roles by their own name. `<image>` in a text stands for an image. masks:
    `segmentation` as it is stated, None without any.
    """

    name: str
    images: tuple[ImageFile, ...]
    turns: tuple[Turn, ...]
    masks: Any = None


class Samples(Protocol):
    """A data set with a length, whose samples can be read in any order, also by several processes.

    Reading one raises BrokenSample.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


def read_item(item: Any, name: str, folder: Path) -> RawSample:
    """A sample from the object that a data set states; `folder` is where its images are.

    Raises BrokenSample if it has no conversation, or one of another form.
    """
    if not isinstance(item, Mapping):
        raise BrokenSample(name, STRUCTURE, f"a {type(item).__name__}, expected an object")
    if item.get("video"):
        raise BrokenSample(name, STRUCTURE, "videos are not read")
    stated = [item[key] for key in _IMAGES if item.get(key) is not None]
    images = tuple(_image(value, name, folder) for value in _listed(stated[0])) if stated else ()
    key = next((key for key in _CONVERSATIONS if item.get(key) is not None), None)
    if key is None:
        raise BrokenSample(name, STRUCTURE, f"no {_CONVERSATIONS[0]} or {_CONVERSATIONS[1]}")
    if not isinstance(item[key], Sequence) or isinstance(item[key], str):
        raise BrokenSample(name, STRUCTURE, f"{key} is not a list of turns")
    turns: list[Turn] = []
    for turn in item[key]:
        turns += _turns(turn, name, key)
    if key == "texts" and turns and not any(IMAGE in text for _, text in turns):
        turns[0] = (turns[0][0], f"{IMAGE}\n" * len(images) + turns[0][1])
    return RawSample(name, images, tuple(turns), item.get("segmentation"))


def captioned(name: str, image: ImageFile, caption: str) -> RawSample:
    """A sample of an image and its caption."""
    return RawSample(name, (image,), ((USER, IMAGE), (ASSISTANT, caption)))


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    return [] if value == "" else [value]


def _image(value: Any, name: str, folder: Path) -> ImageFile:
    """A path relative to `folder`, or bytes; datasets' columns hold one of both."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = content if content is not None else path
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        return folder / value
    raise BrokenSample(name, STRUCTURE, f"an image is {value!r:.60}, expected a path")


def _turns(turn: Any, name: str, key: str) -> list[Turn]:
    if isinstance(turn, Mapping) and isinstance(turn.get(USER), str) and ASSISTANT in turn:
        answer = turn[ASSISTANT]
        return [(USER, turn[USER]), (ASSISTANT, answer if isinstance(answer, str) else "")]
    role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
    if not isinstance(role, str):
        raise BrokenSample(name, STRUCTURE, f"{key} holds {turn!r:.60}, expected a role and a text")
    value = turn["value"] if "value" in turn else turn.get("content")
    return [(_ROLES.get(role, role), _text(value, name))]


def _text(value: Any, name: str) -> str:
    """A text, or the parts of a content as one: an image is `<image>` and a line feed."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise BrokenSample(name, STRUCTURE, f"a text is {value!r:.60}")
    parts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append(f"{IMAGE}\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise BrokenSample(name, STRUCTURE, f"a part of a content is {part!r:.60}")
    return "".join(parts)
