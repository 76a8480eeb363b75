"""Prompts: from text with image placeholders to token ids and places for image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from toolkit import templates
from toolkit.errors import InputError
from toolkit.ops import Array
from toolkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptRules:
    """How a system turns text into tokens.

    splice: "pieces" cuts the text at the placeholder and tokenizes each piece as a text of its
    own, keeping the first BOS only (LLaVA); "token" knows a token of that name (Hugging Face).
    before, after: token ids around every image. eos: ids that end an answer.
    doubled_blank: see Tokenizer. template: the default one.
    """

    template: str
    splice: Literal["pieces", "token"]
    eos: tuple[int, ...]
    placeholder: str = "<image>"
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    doubled_blank: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids in runs; image k stands between run k and run k + 1."""

    runs: tuple[tuple[int, ...], ...]

    @property
    def images(self) -> int:
        """Number of image places."""
        return len(self.runs) - 1


@dataclass(frozen=True)
class Layout:
    """A prompt laid out for the LM: ids and rows, both [1, S] int64, as Ops.place_tokens reads."""

    ids: Array
    rows: Array

    @property
    def length(self) -> int:
        """Positions in all."""
        return int(self.ids.shape[1])

    @property
    def image_tokens(self) -> int:
        """Positions that hold image tokens."""
        return int((self.rows >= 0).sum())


def render(rules: PromptRules, text: str, images: int, template: str) -> tuple[str, str | None]:
    """The full prompt for one question and its stop string.

    template: "auto" takes the system's default, "none" takes `text` as it is; otherwise a name.
    Placeholders are put in front of the question unless it has its own.
    """
    if template == "none":
        return text, None
    chosen = templates.find(rules.template if template == "auto" else template)
    if images and rules.placeholder not in text:
        text = f"{rules.placeholder}\n" * images + text
    return chosen.render([text]), chosen.stop


def tokenize(rules: PromptRules, tokenizer: Tokenizer, text: str) -> Prompt:
    """Token ids of a rendered prompt, cut at its image places."""
    if rules.splice == "pieces":
        return _pieces(rules, tokenizer, text)
    image = tokenizer.id_of(rules.placeholder)
    runs: list[list[int]] = [[]]
    for token in tokenizer.encode(text):
        if token == image:
            runs.append([])
        else:
            runs[-1].append(token)
    return Prompt(tuple(map(tuple, runs)))


def _pieces(rules: PromptRules, tokenizer: Tokenizer, text: str) -> Prompt:
    bos = len(tokenizer.encode("", special=True))
    runs = []
    for number, piece in enumerate(text.split(rules.placeholder)):
        ids = tokenizer.encode(piece)
        inner = ids if number == 0 else ids[bos:]
        runs.append((*(rules.after if number else ()), *inner, *rules.before))
    last = runs[-1]
    runs[-1] = last[: len(last) - len(rules.before)] if rules.before else last
    return Prompt(tuple(runs))


def check_places(prompt: Prompt, images: int) -> None:
    """Raise InputError unless there are as many images as places for them."""
    if prompt.images != images:
        raise InputError(
            f"the prompt has {prompt.images} image place(s) and {images} image(s) were given",
            hint="put one <image> into the prompt for each --image, in their order",
        )


def lay_out(prompt: Prompt, images: Sequence[Array]) -> Layout:
    """Ids and rows of a prompt whose image k is the feature rows `images[k]`."""
    check_places(prompt, len(images))
    ids: list[Array] = []
    rows: list[Array] = []
    for number, run in enumerate(prompt.runs):
        if number:
            places = np.asarray(images[number - 1], np.int64)
            ids.append(np.zeros(len(places), np.int64))
            rows.append(places)
        ids.append(np.asarray(run, np.int64))
        rows.append(np.full(len(run), -1, np.int64))
    return Layout(np.concatenate(ids)[None], np.concatenate(rows)[None])
