"""A request to a session, and what is refused in one before any work is done."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | Path | bytes | bytearray | Image | Array"
_KINDS = "a path, bytes of a file, a PIL image, or a uint8 array [height, width, 3]"


@dataclass(frozen=True)
class Question:
    """One request.

    images: in the order of their slots in the prompt, each a path, the bytes of a file, a PIL
    image or a uint8 array [height, width] or [height, width, 3 or 4]; a lone one need not be in a
    list, and None is none. template: as in prompts.render. stop: texts that end the answer,
    or one text. history: earlier turns of the conversation, user and assistant alternating.
    literal: whether prompt and history are text alone: control tokens and `<image>` that someone
    typed there are read as they are written. answer: the answer, where it is not to be generated
    but only its masks are wanted ("[SEG]" forces one). image_turns: for each image the turn that it
    stands before, counted from 0 with the answers; default: the first, unless turns contain
    `<image>`.
    """

    prompt: str
    images: Sequence[ImageSource] | ImageSource = ()
    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    template: str = "auto"
    stop: Sequence[str] = ()
    history: Sequence[str] = ()
    literal: bool = False
    answer: str | None = None
    image_turns: Sequence[int] = ()

    def checked(self) -> CheckedQuestion:
        """The same, its sequences as tuples. Raises InputError or ConfigError with the reason."""
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling = {self.sampling!r}, expected a Sampling")
        self.sampling.check()
        if isinstance(self.history, str):
            raise InputError(
                "history is one text, expected a list of turns",
                hint="turns alternate: user, assistant, user, assistant",
            )
        single_stop = isinstance(self.stop, str)
        return CheckedQuestion(
            _text(self.prompt, "prompt"),
            _images(self.images),
            _max_tokens(self.max_tokens),
            self.sampling,
            _text(self.template, "template"),
            _texts([self.stop] if single_stop else self.stop, "stop"),
            _texts(self.history, "history"),
            _flag(self.literal, "literal"),
            None if self.answer is None else _text(self.answer, "answer"),
            _counts(self.image_turns, _images(self.images), len(self.history or ()) + 1),
        )


@dataclass(frozen=True)
class CheckedQuestion:
    """A question whose fields are what they should be."""

    prompt: str
    images: tuple[ImageSource, ...]
    max_tokens: int
    sampling: Sampling
    template: str
    stop: tuple[str, ...]
    history: tuple[str, ...]
    literal: bool
    answer: str | None
    images_by_turn: tuple[int, ...]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} = {value!r:.80}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as odd:
        raise InputError(
            f"{name} has half a character (a lone surrogate, U+{ord(value[odd.start]):04X}) at "
            f"index {odd.start}",
            hint="texts must be valid Unicode; was a file read in the wrong encoding?",
        ) from None
    return value


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} = {value!r:.80}, expected True or False")
    return value


def _texts(values: object, name: str) -> tuple[str, ...]:
    if values is None:
        return ()
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise InputError(f"{name} = {values!r:.80}, expected a list of texts")
    return tuple(_text(value, f"{name}[{number}]") for number, value in enumerate(values))


def _images(values: object) -> tuple[ImageSource, ...]:
    if values is None:
        return ()
    images = [values] if _is_image(values) else values
    if not isinstance(images, Sequence):
        raise InputError(f"images is {_shown(values)}, expected a list; each is {_KINDS}")
    for number, image in enumerate(images, 1):
        if not _is_image(image):
            raise InputError(f"image {number} is {_shown(image)}, expected {_KINDS}")
    return tuple(images)


def _counts(turns: object, images: tuple[ImageSource, ...], most: int) -> tuple[int, ...]:
    """How many images stand before each turn."""
    if turns is None or (isinstance(turns, Sequence) and not len(turns)):
        return (len(images),)
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise InputError(f"image_turns = {turns!r:.80}, expected a list of numbers")
    if len(turns) != len(images) or sorted(turns) != list(turns):
        raise InputError(
            f"image_turns = {turns!r:.80} for {len(images)} images",
            hint="one number for each image, in ascending order",
        )
    if any(turn not in range(0, most, 2) for turn in turns):
        raise InputError(
            f"image_turns = {turns!r:.80}: images stand before the user's turns",
            hint=f"of {most} turns these are {', '.join(map(str, range(0, most, 2)))}",
        )
    return tuple(turns.count(turn) for turn in range(most))


def _shown(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    return f"{value!r:.80}"


def _is_image(value: object) -> bool:
    """Whether a value is one image. Pillow is not loaded for that."""
    if isinstance(value, (str, bytes, bytearray, os.PathLike)):
        return True
    if isinstance(value, np.ndarray):
        return value.ndim in (2, 3)
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "PIL.Image.Image"
        for kind in type(value).__mro__
    )


def _max_tokens(value: object) -> int:
    try:
        if isinstance(value, (bool, float)):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"--max-tokens {value!r:.80} is not a whole number") from None
    if count < 1:
        raise InputError(f"--max-tokens {count} is less than 1")
    return count
