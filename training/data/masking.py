"""Conversations as token ids and labels: which tokens a model learns to say.

Labels are the ids of targets and -100 elsewhere, as in haotian-liu/LLaVA (llava/train/train.py),
alibaba/conv-llava, yuecao0119/MMFuser, LLaVA-VL/LLaVA-NeXT (preprocess_qwen). Their maskers find
the answers in different ways:

- plain: one image and a caption; everything but the image's slot is a target.
- by rounds (vicuna_v1 and its like, llama_2, with a sentencepiece tokenizer): each round of the
  text is tokenized by itself and counted. What the count corrects is Vicuna's vocabulary: "USER"
  after "</s>" is a token less than at the beginning of a text.
- qwen: whole turns of the assistant with their header; and in every turn line feeds and the two
  control tokens.
- answers, for everything else, and for all of them but plain where original=False: the ids of the
  prompt before an answer must begin the ids of the whole conversation; the targets are what
  follows, up to the end of the turn. The originals' masker for ChatML (mpt) gives the same wherever
  it works; that of the oldest templates (### Human) writes other text, which is not reproduced.

Where counts do not meet, the originals drop all labels of a sample; here such a sample is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.text import prompts, templates
from edgevlm.toolkit.text.prompts import PromptRules, Rendered
from edgevlm.toolkit.text.templates import Template
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training.data.broken import IMAGE_COUNT, MISMATCH, UNKNOWN_TOKEN, BrokenSample

IGNORED = -100
_SLOT = -200  # in ids: an image
QWEN = "qwen_1_5"  # qwen_2 is the same template
Ids: TypeAlias = list[int]
Runs: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TextRules:
    """How conversations become ids and labels.

    template: a name, or "auto" for the model's own. original: the masker of the original trainer
    where the template has one. one_less: by rounds, whether every round but the first counts one
    token less; LLaVA and MMFuser do so unless the tokenizer is a legacy one, ConvLLaVA always.
    move: whether a turn's only `<image>` goes to the front "always" (LLaVA, which also writes it
    anew where it stands there) or "inside", only from within the turn (LLaVA-NeXT).
    """

    prompts: PromptRules
    template: str = "auto"
    original: bool = True
    one_less: bool = True
    move: Literal["always", "inside"] = "always"

    @property
    def named(self) -> Template | None:
        """The template; None if it is the checkpoint's own chat template."""
        if self.template == "auto" and self.prompts.chat_template is not None:
            return None
        return templates.find(self.prompts.template if self.template == "auto" else self.template)


@dataclass(frozen=True)
class Labelled:
    """Ids between image slots as in prompts.Prompt, and for each its label: the id, or -100."""

    runs: Runs
    labels: Runs


def encode(name: str, turns: Sequence[str], rules: TextRules, tokenizer: Tokenizer) -> Labelled:
    """Ids and labels of a conversation: user and assistant alternating, an answer last.

    Raises BrokenSample, which calls the sample `name`, if the answers cannot be found in the ids,
    and InputError for a template that does not exist or cannot be rendered.
    """
    text = _Text(name, rules, tokenizer)
    moved = [text.moved(turn) for turn in turns]
    return _in_runs(*_masker(rules)(text, moved))


def check_template(rules: TextRules, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Notes on what the template cannot teach, for the user; none for most templates.

    Raises ConfigError if no answer can be found in its prompts, as with chat templates that write
    an answer's turn in another way than they ask for it.
    """
    image = rules.prompts.placeholder
    dialogue = [image, "A"] if _is_plain(rules) else ["Q", "A", "Q", "A"]
    try:
        labels = encode("a question", dialogue[:2], rules, tokenizer).labels
    except BrokenSample as odd:
        raise ConfigError(
            f"the template cannot be trained with: {odd.reason}",
            hint="choose a conversation template with --template, such as the one that the model "
            f"was first trained with ({rules.prompts.template})",
        ) from None
    notes = []
    try:
        encode("a dialogue", dialogue, rules, tokenizer)
    except BrokenSample as odd:
        notes.append(f"samples of more than one round are broken with this template: {odd.reason}")
    ends = any(number in rules.prompts.eos for run in labels for number in run)
    if rules.named is None and not ends:  # every named one writes an end, some as plain text
        notes.append("the template writes no end after an answer: the model will not learn to stop")
    return tuple(notes)


class _Text:
    """The texts of one sample, tokenized by the rules; an image is one id, _SLOT."""

    def __init__(self, name: str, rules: TextRules, tokenizer: Tokenizer) -> None:
        self.name = name
        self.rules = rules
        self.tokenizer = tokenizer

    def moved(self, turn: str) -> str:
        """The turn with its only image in front; several stay where they are."""
        image, rules = self.rules.prompts.placeholder, self.rules
        if turn.count(image) != 1 or (rules.move == "inside" and turn.startswith(image)):
            return turn
        turn = f"{image}\n{turn.replace(image, '').strip()}".strip()
        mmtag = "mmtag" in (rules.prompts.template if rules.template == "auto" else rules.template)
        return turn.replace(image, f"<Image>{image}</Image>") if mmtag else turn

    def rendered(self, turns: Sequence[str]) -> Rendered:
        """The conversation, up to the next answer if a question is the last turn."""
        ended = len(turns) % 2 == 0
        return prompts.render(self.rules.prompts, turns, 0, self.rules.template, ended=ended)

    def ids(self, text: str | Rendered) -> Ids:
        """Ids of a text, the tokens that begin a text among them."""
        try:
            prompt = prompts.tokenize(self.rules.prompts, self.tokenizer, text)
        except InputError as unknown:
            raise BrokenSample(self.name, UNKNOWN_TOKEN, unknown.message) from None
        first, *others = prompt.runs
        return [*first, *(number for run in others for number in (_SLOT, *run))]

    def mismatch(self, reason: str) -> BrokenSample:
        """The error for answers that were not found."""
        return BrokenSample(self.name, MISMATCH, reason)


def _is_plain(rules: TextRules) -> bool:
    return rules.named is not None and rules.named.style == "plain"


def _masker(rules: TextRules) -> Callable[[_Text, Sequence[str]], tuple[Ids, Ids]]:
    t = rules.named
    if t is None:
        return _answers
    if t.style == "plain":
        return _plain
    if not rules.original:
        return _answers
    if t.style in ("two", "llama2") and rules.prompts.sentencepiece is not None and t.sep2:
        return _by_rounds
    return _qwen if t == templates.find(QWEN) else _answers


def _plain(text: _Text, turns: Sequence[str]) -> tuple[Ids, Ids]:
    image, t = text.rules.prompts.placeholder, text.rules.named
    assert t is not None
    if len(turns) != 2 or image not in turns[0]:
        reason = "the plain template takes one image and its caption"
        raise BrokenSample(text.name, IMAGE_COUNT, reason)
    ids, first = text.ids(image + turns[1] + t.sep), len(text.ids(image))
    return ids, [IGNORED] * first + ids[first:]


def _by_rounds(text: _Text, turns: Sequence[str]) -> tuple[Ids, Ids]:
    t = text.rules.named
    assert t is not None
    whole = text.rendered(turns).text
    before_answer = f"{t.sep}{t.roles[1]}: " if t.style == "two" else "[/INST] "
    less = int(t.style == "two" and text.rules.one_less)
    ids = text.ids(whole)
    labels, at = [IGNORED], 1  # BOS
    for number, turn in enumerate(whole.split(t.sep2)):
        parts = turn.split(before_answer)
        if len(parts) != 2:
            break
        fewer = less if number else 0
        # The BOS of the round stands for the token that ends it; a lone blank ends the question.
        count = len(text.ids(turn)) - fewer
        question = len(text.ids(parts[0] + before_answer)) - 2 - fewer
        labels += [IGNORED] * question + ids[at + question : at + count]
        at += count
    if not len(labels) == at == len(ids):
        raise text.mismatch(f"the rounds have {at} tokens, the whole {len(ids)}")
    return ids, labels


def _qwen(text: _Text, turns: Sequence[str]) -> tuple[Ids, Ids]:
    t, rules = text.rules.named, text.rules.prompts
    assert t is not None
    line_feed = text.tokenizer.encode("\n", special=False)
    control = [text.tokenizer.id_of(token) for token in ("<|im_start|>", "<|im_end|>")]
    always = {*line_feed[:1], *control}
    ids: Ids = []
    labels: Ids = []
    for number, turn in enumerate((None, *turns)):
        piece = t.system if turn is None else t.roles[1 - number % 2] + turn
        piece = piece.replace(rules.placeholder, rules.image_text)
        own = text.ids(Rendered((piece + t.sep,), brings_bos=True))  # none is added
        answer = number > 0 and number % 2 == 0
        ids += own
        labels += [i if answer or i in always else IGNORED for i in own]
    return ids, labels


def _answers(text: _Text, turns: Sequence[str]) -> tuple[Ids, Ids]:
    whole = text.rendered(turns)
    ids = text.ids(whole)
    labels = [IGNORED] * len(ids)
    for answer in range(1, len(turns), 2):
        before = text.ids(text.rendered(turns[:answer]))
        through = text.rendered(turns[: answer + 1])
        if ids[: len(before)] != before or not whole.text.startswith(through.text):
            raise text.mismatch(
                f"the prompt {'before' if ids[: len(before)] != before else 'up to the end of'} "
                f"answer {(answer + 1) // 2} does not begin the whole conversation"
            )
        # A token in which the end of the turn and the next turn merge is no target.
        end = _common(ids, text.ids(through))
        labels[len(before) : end] = ids[len(before) : end]
    return ids, labels


def _common(ids: Ids, others: Ids) -> int:
    """How many ids at the beginning are equal."""
    return next((n for n, (a, b) in enumerate(zip(ids, others)) if a != b), len(others))  # noqa: B905


def _in_runs(ids: Ids, labels: Ids) -> Labelled:
    """Cut at the images."""
    runs: list[Ids] = [[]]
    targets: list[Ids] = [[]]
    for number, label in zip(ids, labels, strict=True):
        if number == _SLOT:
            runs.append([])
            targets.append([])
        else:
            runs[-1].append(number)
            targets[-1].append(label)
    return Labelled(tuple(map(tuple, runs)), tuple(map(tuple, targets)))
