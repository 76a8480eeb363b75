"""Prompts: from text with image placeholders to token ids and the rows of image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from edgevlm.toolkit.errors import InputError, PromptTooLong
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text import chat_template, templates
from edgevlm.toolkit.text import literal as literal_text
from edgevlm.toolkit.text.sentencepiece_text import SentencePieceRules
from edgevlm.toolkit.text.templates import Template
from edgevlm.toolkit.text.tokenizer import Tokenizer

_LONG = 16  # characters per position of the context from which on a text is called long


@dataclass(frozen=True)
class PromptRules:
    """How a system turns text into tokens.

    template: the default one, unless the checkpoint brings a chat_template (Jinja text, rendered
    with special_tokens: bos_token and the like). splice: "pieces" cuts the text at the placeholder
    and tokenizes each piece separately, keeping the first BOS only (LLaVA); "token" has a token
    for the placeholder (Hugging Face). eos: ids that end an answer. placeholder: the text that
    stands for an image in a user's text; image_text: the text that a rendered prompt has instead,
    under "token" the image token's own name. sentencepiece: the steps before a tokenizer.json made
    from such a model. cut: prompts end after so many positions; None raises an error if they do not
    fit. reuse_last: a prompt with one slot more than images uses the last image twice. The last two
    are quirks, see toolkit/checkpoints/layouts/quirks.py.
    """

    template: str
    splice: Literal["pieces", "token"]
    eos: tuple[int, ...]
    placeholder: str = "<image>"
    image_text: str = "<image>"
    sentencepiece: SentencePieceRules | None = None
    cut: int | None = None
    reuse_last: bool = False
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Token ids in runs; the slot of image k is between run k and run k + 1."""

    runs: tuple[tuple[int, ...], ...]

    @property
    def images(self) -> int:
        """Number of image slots."""
        return len(self.runs) - 1

    def behind(self, start: Prompt) -> tuple[int, ...]:
        """The ids behind those of a prompt that this one begins with."""
        return self.runs[-1][len(start.runs[-1]) :]


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
        return self.between(0, positions)

    def between(self, begin: int, end: int) -> PromptSequence:
        """The positions from `begin` up to `end`."""
        return PromptSequence(self.ids[:, begin:end], self.rows[:, begin:end])


@dataclass(frozen=True)
class Rendered:
    """A full prompt as text.

    stretches: each is tokenized separately. stop: text that ends the answer; tiles: see Template.
    mark: the character that breaks control tokens in the turns, see literal.py; None if no turn
    holds one. brings_bos: whether the text begins with the BOS token if the template has one.
    """

    stretches: tuple[str, ...]
    stop: str | None = None
    tiles: bool = True
    mark: str | None = None
    brings_bos: bool = False

    @property
    def text(self) -> str:
        """The prompt as one text, without marks."""
        text = "".join(self.stretches)
        return text if self.mark is None else text.replace(self.mark, "")

    def followed_by(self, text: str) -> Rendered:
        """The same with a text behind it, such as an answer."""
        return replace(self, stretches=(*self.stretches[:-1], self.stretches[-1] + text))


def render(
    rules: PromptRules,
    turns: Sequence[str],
    images: int | Sequence[int],
    template: str,
    literal: Tokenizer | None = None,
    *,
    ended: bool = False,
) -> Rendered:
    """The full prompt for a conversation: turns of user and assistant, the last one the user's.

    ended: the last turn is the assistant's instead, and nothing follows it; training reads that.
    template: a name, "auto" for the model's own, or "none" for a single turn that is the whole
    prompt. images: how many the first turn has, or each turn; their placeholders are put before it
    unless a turn contains one. literal: the tokenizer if turns are text alone, in which neither
    control tokens nor placeholders have a meaning. Raises InputError for an unknown template, turns
    that do not end as they should or are too many for the template, or a chat template that cannot
    be rendered.
    """
    if template == "none":
        return _raw(turns, literal)
    if len(turns) % 2 == ended:
        raise InputError(
            f"the conversation has {len(turns)} turns; it must end with the "
            + ("answer" if ended else "user's question"),
            hint=f"turns alternate: user, assistant{'' if ended else ', user'}",
        )
    own = template == "auto" and rules.chat_template is not None
    name = rules.template if template == "auto" else template
    chosen = templates.find(name)
    if chosen.style == "plain" and len(turns) > 1 + ended and not own:
        raise InputError(
            f"the template {name!r} is for captions: it has no form for several turns",
            hint="choose another --template, or ask without the earlier turns",
        )
    mark = None
    slots, counts = literal is None, _by_turn(images, len(turns))
    if slots and _has_slots(rules, turns):
        counts = [0] * len(turns)
    if literal is not None:
        turns, mark = _broken(rules, turns, literal, _wording(rules, template))
    if own:
        return _by_chat_template(rules, turns, counts, mark, slots=slots)
    stretches = _stretches(rules, chosen, turns, counts, slots=slots)
    return Rendered(stretches, chosen.stop, chosen.tiles, mark, chosen.brings_bos)


def _by_turn(images: int | Sequence[int], turns: int) -> list[int]:
    """How many images stand before each turn. Raises InputError for too many counts."""
    counts = [images] if isinstance(images, int) else list(images)
    if len(counts) > turns:
        raise InputError(f"images for {len(counts)} turns of a conversation of {turns}")
    return counts + [0] * (turns - len(counts))


def _raw(turns: Sequence[str], literal: Tokenizer | None) -> Rendered:
    if len(turns) != 1:
        raise InputError(
            "a conversation needs a template to join its turns",
            hint="leave --template at auto, or give the whole prompt as one text",
        )
    if literal is not None:
        raise InputError(
            "--literal is for what a user typed; with --template none the prompt is the whole text",
            hint="leave --template at auto, or drop --literal",
        )
    return Rendered((turns[0],))


def _wording(rules: PromptRules, template: str) -> str:
    """The text that a template brings itself."""
    if template == "auto":
        return rules.chat_template or templates.find(rules.template).literals
    return templates.find(template).literals


def _broken(
    rules: PromptRules, turns: Sequence[str], tokenizer: Tokenizer, wording: str
) -> tuple[list[str], str | None]:
    """The turns with their control tokens broken by a mark; no mark if there are none."""
    control = literal_text.control_tokens(tokenizer, wording)
    control = (*control, rules.placeholder, rules.image_text)
    mark = literal_text.unused_mark(turns)
    shown = [literal_text.broken(text, control, mark) for text in turns]
    return shown, mark if shown != list(turns) else None


def notes_on(
    rules: PromptRules, turns: Sequence[str], template: str, tokenizer: Tokenizer
) -> tuple[str, ...]:
    """A line about control tokens that the turns hold, other than an image's; often none."""
    if template == "none":
        return ()
    control = literal_text.control_tokens(tokenizer, _wording(rules, template))
    typed = [t for t in control if t not in (rules.placeholder, rules.image_text)]
    found = [token for token in typed if any(token in text for text in turns)]
    line = f"control tokens in the prompt's text: {', '.join(found)}; --literal reads them as text"
    return (line,) if found else ()


def _has_slots(rules: PromptRules, turns: Sequence[str]) -> bool:
    return any(name in text for text in turns for name in (rules.placeholder, rules.image_text))


def _by_chat_template(
    rules: PromptRules, turns: Sequence[str], images: list[int], mark: str | None, *, slots: bool
) -> Rendered:
    assert rules.chat_template is not None
    texts = (
        [text.replace(rules.placeholder, rules.image_text) for text in turns] if slots else turns
    )
    tokens = rules.special_tokens
    text = chat_template.render(rules.chat_template, tokens, texts, images, rules.image_text)
    bos = tokens.get("bos_token")
    return Rendered((text,), mark=mark, brings_bos=bos is not None and text.startswith(bos))


def _stretches(
    rules: PromptRules, chosen: Template, turns: Sequence[str], images: list[int], *, slots: bool
) -> tuple[str, ...]:
    """The texts between the template's cuts; what a user typed is never cut."""
    shown = rules.image_text + chosen.after_image
    behind = [turn for turn, count in enumerate(images) if count]
    stretches = [""]
    ended = len(turns) % 2 == 0
    for i, span in enumerate(chosen.spans(turns, behind_images=behind, ended=ended)):
        if i % 2 == 0:
            _add(stretches, span)
            continue
        _add(stretches, f"{shown}\n" * images[i // 2])
        first, *others = span.split(rules.placeholder) if slots else [span]
        stretches[-1] += first
        for text in others:
            _add(stretches, shown)
            stretches[-1] += text
    return tuple(stretches)


def _add(stretches: list[str], own: str) -> None:
    """Continue with text of the template, in which cuts have their meaning."""
    first, *others = own.split(templates.CUT)
    stretches[-1] += first
    stretches += others


def check_text_length(
    rules: PromptRules, tokenizer: Tokenizer, rendered: Rendered, context: int
) -> None:
    """Raise InputError if a prompt is so long that its text alone cannot fit into the context.

    Few characters are not looked at: tokenizing them takes less time than this.
    """
    text = rendered.text
    if rules.cut is not None or len(text) < _LONG * context:
        return
    fewest = tokenizer.fewest_tokens(text.replace(rules.placeholder, " "))
    if fewest > context:
        raise PromptTooLong(
            f"the prompt's {len(text)} characters are at least {fewest} tokens, the engine's "
            f"context is {context}",
            hint="shorten the prompt, or build with a larger --max-context",
        )


def tokenize(rules: PromptRules, tokenizer: Tokenizer, prompt: str | Rendered) -> Prompt:
    """Token ids of a rendered prompt or of a raw text, cut at its image slots.

    Each stretch and, with splice "pieces", each text between images is tokenized separately; the
    first alone gets the tokens that begin a text, unless it brings its own BOS. With "token", a
    prompt may say `<image>`, whatever the token's own name is. Raises InputError if the model has
    no embedding for a token of the prompt.
    """
    rendered = Rendered((prompt,)) if isinstance(prompt, str) else prompt
    pieces = rules.splice == "pieces"
    image = None if pieces else tokenizer.id_of(rules.image_text)
    runs: list[list[int]] = [[]]
    started = False
    for stretch in rendered.stretches:
        for number, text in enumerate(_texts(rules, stretch)):
            if number:
                runs.append([])
            for token in _ids(tokenizer, text, rendered, started):
                if token == image:
                    runs.append([])
                else:
                    runs[-1].append(token)
            started = True
    for run in runs:
        tokenizer.check_rows(run)
    return Prompt(tuple(map(tuple, runs)))


def _texts(rules: PromptRules, stretch: str) -> list[str]:
    """What is tokenized by itself: with "pieces" the texts between images, else the whole."""
    if rules.splice == "pieces":
        return stretch.split(rules.placeholder)
    if rules.placeholder in rules.image_text:
        return [stretch]
    return [stretch.replace(rules.placeholder, rules.image_text)]


def _ids(tokenizer: Tokenizer, text: str, rendered: Rendered, started: bool) -> list[int]:
    special = not (started or rendered.brings_bos)
    if rendered.mark is None:
        return tokenizer.encode(text, special=special)
    return literal_text.encode(tokenizer, text, rendered.mark, special=special)


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
