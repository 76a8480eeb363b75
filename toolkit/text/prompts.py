"""Prompts: from text with image placeholders to token ids and places for image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import templates
from edgevlm.toolkit.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptRules:
    """How a system turns text into tokens.

    splice: "pieces" cuts the text at the placeholder and tokenizes each piece as a text of its
    own, keeping the first BOS only (LLaVA); "token" knows a token of that name (Hugging Face).
    placeholder: what stands for a image in a raw prompt; image_text: what a rendered one has for
    it. eos: ids that end an answer. doubled_blank: see Tokenizer. template: the default one.
    cut: prompts end after so many positions, None for an error where they do not fit. reuse_last:
    one place more than images shows the last image again (both: layouts/quirks.py).
    """

    template: str
    splice: Literal["pieces", "token"]
    eos: tuple[int, ...]
    placeholder: str = "<image>"
    image_text: str = "<image>"
    doubled_blank: bool = False
    cut: int | None = None
    reuse_last: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids in runs; image k stands between run k and run k + 1."""

    runs: tuple[tuple[int, ...], ...]

    @property
    def images(self) -> int:
        """Number of image places."""
        return len(self.runs) - 1


@dataclass(frozen=True)
class PromptSequence:
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

    def first(self, positions: int) -> PromptSequence:
        """Its beginning."""
        return PromptSequence(self.ids[:, :positions], self.rows[:, :positions])


@dataclass(frozen=True)
class Rendered:
    """A prompt's full text. stop: ends the answer beside EOS; tiles: see Template."""

    text: str
    stop: str | None = None
    tiles: bool = True


def render(rules: PromptRules, turns: Sequence[str], images: int, template: str) -> Rendered:
    """The full prompt for a conversation: user and assistant in turn, the last one a question.

    template: "auto" takes the system's default, "none" takes the one turn as it is; otherwise a
    name. Placeholders are put in front of the first turn unless some turn has its own.
    """
    if template == "none":
        if len(turns) != 1:
            raise InputError(
                "a conversation needs a template to join its turns",
                hint="leave --template at auto, or give the whole prompt as one text",
            )
        return Rendered(turns[0])
    if len(turns) % 2 == 0:
        raise InputError(
            f"the conversation has {len(turns)} turns; it must end with the user's question",
            hint="turns alternate: user, assistant, user",
        )
    chosen = templates.find(rules.template if template == "auto" else template)
    said = list(turns)
    if images and not any(rules.placeholder in text for text in said):
        said[0] = f"{rules.placeholder}\n" * images + said[0]
    shown = rules.image_text + chosen.after_image
    said = [text.replace(rules.placeholder, shown) for text in said]
    return Rendered(chosen.render(said), chosen.stop, chosen.tiles)


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
    """Pieces between images, and between templates.CUT within them, are texts of their own."""
    bos = len(tokenizer.encode("", special=True))
    runs: list[tuple[int, ...]] = []
    for piece in text.split(rules.placeholder):
        ids: list[int] = []
        for part in piece.split(templates.CUT):
            ids += tokenizer.encode(part)[bos if runs or ids else 0 :]
        runs.append(tuple(ids))
    return Prompt(tuple(runs))


def check_places(prompt: Prompt, images: int) -> None:
    """Raise InputError unless there are as many images as places for them."""
    if prompt.images != images:
        raise InputError(
            f"the prompt has {prompt.images} image place(s) and {images} image(s) were given",
            hint="put one <image> into the prompt for each --image, in their order",
        )


def assemble(prompt: Prompt, images: Sequence[Array]) -> PromptSequence:
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
    return PromptSequence(np.concatenate(ids)[None], np.concatenate(rows)[None])
