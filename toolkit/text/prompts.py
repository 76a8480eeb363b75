"""Prompts: from text with image placeholders to token ids and the rows of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import templates
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptRules:
    """How a system turns text into tokens.

    template: the default one. splice: "pieces" cuts the text at the placeholder and tokenizes each
    piece separately, keeping the first BOS only (LLaVA); "token" has a token for the placeholder
    (Hugging Face). eos: ids that end an answer. placeholder: the text that stands for an image in
    a raw prompt; image_text: the text that a rendered prompt has instead, under "token" the image
    token's own name. sentencepiece: the steps before a tokenizer.json made from such a model. cut:
    prompts end after so many positions; None raises an error if they do not fit. reuse_last: a
    prompt with one slot more than images uses the last image twice. The last two are quirks, see
    toolkit/checkpoints/layouts/quirks.py.
    """

    template: str
    splice: Literal["pieces", "token"]
    eos: tuple[int, ...]
    placeholder: str = "<image>"
    image_text: str = "<image>"
    sentencepiece: SentencePieceRules | None = None
    cut: int | None = None
    reuse_last: bool = False


@dataclass(frozen=True)
class Prompt:
    """Token ids in runs; the slot of image k is between run k and run k + 1."""

    runs: tuple[tuple[int, ...], ...]

    @property
    def images(self) -> int:
        """Number of image slots."""
        return len(self.runs) - 1


@dataclass(frozen=True)
class PromptSequence:
    """A prompt as the LM takes it: ids and rows, both int64 [1, S], see Ops.place_tokens."""

    ids: Array
    rows: Array

    @property
    def length(self) -> int:
        """Number of positions."""
        return int(self.ids.shape[1])

    @property
    def image_tokens(self) -> int:
        """Number of positions that hold image tokens."""
        return int((self.rows >= 0).sum())

    def first(self, positions: int) -> PromptSequence:
        """The first `positions` positions."""
        return PromptSequence(self.ids[:, :positions], self.rows[:, :positions])


@dataclass(frozen=True)
class Rendered:
    """The full text of a prompt. stop: text that ends the answer; tiles: see Template."""

    text: str
    stop: str | None = None
    tiles: bool = True


def render(rules: PromptRules, turns: Sequence[str], images: int, template: str) -> Rendered:
    """The full prompt for a conversation: turns of user and assistant, the last one the user's.

    template: a name, "auto" for the system's default, or "none" for a single turn that is the
    whole prompt. Placeholders are put before the first turn unless a turn contains one. Raises
    InputError for an unknown template or turns that do not end with the user's.
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
    texts = list(turns)
    if images and not any(rules.placeholder in text for text in texts):
        texts[0] = f"{rules.placeholder}\n" * images + texts[0]
    shown = rules.image_text + chosen.after_image
    texts = [text.replace(rules.placeholder, shown) for text in texts]
    return Rendered(chosen.render(texts), chosen.stop, chosen.tiles)


def tokenize(rules: PromptRules, tokenizer: Tokenizer, text: str) -> Prompt:
    """Token ids of a rendered prompt, cut at its image slots.

    Raises InputError if the model has no embedding for a token of the prompt.
    """
    prompt = (_pieces if rules.splice == "pieces" else _around_token)(rules, tokenizer, text)
    for run in prompt.runs:
        tokenizer.check_rows(run)
    return prompt


def _around_token(rules: PromptRules, tokenizer: Tokenizer, text: str) -> Prompt:
    """Pieces between image tokens. A prompt says `<image>`, whatever the token's own name is."""
    image = tokenizer.id_of(rules.image_text)
    runs: list[list[int]] = [[]]
    if rules.placeholder not in rules.image_text:  # a whole prompt that was not rendered
        text = text.replace(rules.placeholder, rules.image_text)
    for token in tokenizer.encode(text):
        if token == image:
            runs.append([])
        else:
            runs[-1].append(token)
    return Prompt(tuple(map(tuple, runs)))


def _pieces(rules: PromptRules, tokenizer: Tokenizer, text: str) -> Prompt:
    """Pieces between images, and between templates.CUT within them, are tokenized separately."""
    bos = len(tokenizer.encode("", special=True))
    runs: list[tuple[int, ...]] = []
    for piece in text.split(rules.placeholder):
        ids: list[int] = []
        for stretch in piece.split(templates.CUT):
            ids += tokenizer.encode(stretch)[bos if runs or ids else 0 :]
        runs.append(tuple(ids))
    return Prompt(tuple(runs))


def check_slots(prompt: Prompt, images: int) -> None:
    """Raise InputError unless the prompt has as many image slots as there are images."""
    if prompt.images != images:
        raise InputError(
            f"the prompt has {prompt.images} image slot(s) and {images} image(s) were given",
            hint="put one <image> into the prompt for each --image, in their order",
        )


def assemble(prompt: Prompt, images: Sequence[Array]) -> PromptSequence:
    """The prompt sequence; the tokens of image k are the feature rows `images[k]`, int64 [tokens].

    Raises InputError unless there are as many images as slots.
    """
    check_slots(prompt, len(images))
    ids: list[Array] = []
    rows: list[Array] = []
    for number, run in enumerate(prompt.runs):
        if number:
            image = np.asarray(images[number - 1], np.int64)
            ids.append(np.zeros(len(image), np.int64))
            rows.append(image)
        ids.append(np.asarray(run, np.int64))
        rows.append(np.full(len(run), -1, np.int64))
    return PromptSequence(np.concatenate(ids)[None], np.concatenate(rows)[None])
