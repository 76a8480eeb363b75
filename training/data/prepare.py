"""From a raw sample to one that a batch takes; whatever is wrong with it is said by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.images import decode, views
from edgevlm.toolkit.images.preprocess import ImageRules
from edgevlm.toolkit.images.views import PreparedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm import components, cost
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.training.data import broken, masking
from edgevlm.training.data.broken import BrokenSample
from edgevlm.training.data.masking import Labelled, TextRules
from edgevlm.training.data.masks import MaskRules, SampleMasks, of_sample
from edgevlm.training.data.sample import Sample, image_tokens, lay_out, scored
from edgevlm.training.data.samples import ASSISTANT, USER, ImageFile, RawSample


@dataclass(frozen=True)
class SampleRules:
    """How a raw sample becomes ids, labels and pixels.

    tokens_per_view: feature rows that the merger gives for a view. max_length: positions that the
    language model reads; what is beyond is cut off. None for no limit. masks: of a model that makes
    masks.
    """

    text: TextRules
    images: ImageRules
    tokens_per_view: int
    max_length: int | None = None
    masks: MaskRules | None = None


def rules_for(
    model: ModelConfig,
    template: str = "auto",
    *,
    original: bool = True,
    max_length: int | None = None,
    several: Literal["tile", "pad"] = "pad",
) -> SampleRules:
    """How the trainer of the model's system makes samples.

    template: a conversation template, or "auto" for the model's own. original: the original
    trainer's masker, see masking.py. several: how a sample with more than one image shows each,
    if the model has tiles; LLaVA-NeXT's trainer pads, also where its inference tiles.
    """
    prompts, images = model.prompts, model.images
    legacy = prompts.sentencepiece is not None and prompts.sentencepiece.legacy
    moves: Literal["always", "inside"] = "always"
    if model.system in ("llava_next", "mlcd", "mlcd_seg"):  # all by LLaVA-NeXT's code
        moves = "inside"
    text = TextRules(
        prompts, template, original, one_less=model.system == "convllava" or not legacy, move=moves
    )
    if images.tiling is not None:
        images = replace(images, tiling=replace(images.tiling, several=several))
    return SampleRules(text, images, tokens_per_view(model), max_length)


def tokens_per_view(model: ModelConfig) -> int:
    """Feature rows of one view after the merger, without a newline's."""
    merger = components.merger_component(model.merger, model.encoders)
    return int(cost.outputs(merger, cost.image_axes(model, 1, 1))["features"].shape[0])


def prepare(raw: RawSample, rules: SampleRules, tokenizer: Tokenizer) -> Sample:
    """The sample for a batch. Raises BrokenSample with the first thing that is wrong."""
    texts = checked(raw, rules.text.prompts.placeholder)
    labelled = masking.encode(raw.name, texts, rules.text, tokenizer)
    if len(labelled.runs) - 1 != len(raw.images):
        raise _count(raw, len(labelled.runs) - 1)
    named = rules.text.named
    tiles = named is None or named.tiles
    images = tuple(_image(raw, image, rules.images, tiles) for image in raw.images)
    length = _length(raw.name, labelled, images, rules)
    cut = length if rules.max_length is None else min(length, rules.max_length)
    masks = SampleMasks()
    if rules.masks is not None:
        ids, rows, _ = _laid_out(labelled, images, rules)
        masks = of_sample(raw, ids[:cut], rows[:cut], rules.masks)
    return Sample(raw.name, labelled.runs, labelled.labels, images, cut, length - cut, masks)


def checked(raw: RawSample, image: str) -> list[str]:
    """The texts of the turns: user and assistant alternating, an answer last.

    A first turn of the assistant is left out, as in the originals. Nothing is read or tokenized.
    Raises BrokenSample for other roles, empty texts, no answer, or another number of images.
    """
    turns = raw.turns[1:] if raw.turns and raw.turns[0][0] == ASSISTANT else raw.turns
    for number, (role, _) in enumerate(turns):
        expected = ASSISTANT if number % 2 else USER
        if role != expected:
            reason = f"turn {number + 1} is of {role!r:.40}, expected {expected!r}"
            raise BrokenSample(raw.name, broken.ROLES, reason)
    if not turns or len(turns) % 2:
        raise BrokenSample(raw.name, broken.NO_ANSWER, "" if turns else "no turns")
    for number, (_, text) in enumerate(turns):
        if not text.strip():
            kind = broken.EMPTY_ANSWER if number % 2 else broken.EMPTY_QUESTION
            raise BrokenSample(raw.name, kind, f"turn {number + 1}")
    slots = sum(text.count(image) for _, text in turns)
    if slots != len(raw.images):
        raise _count(raw, slots)
    return [text for _, text in turns]


def check_files(raw: RawSample) -> None:
    """Raise BrokenSample if a file of the sample's images does not exist."""
    for image in raw.images:
        if isinstance(image, Path) and not image.is_file():
            raise BrokenSample(raw.name, broken.MISSING_IMAGE, str(image))


def _count(raw: RawSample, slots: int) -> BrokenSample:
    reason = f"{slots} in the text, {len(raw.images)} image(s)"
    return BrokenSample(raw.name, broken.IMAGE_COUNT, reason)


def _image(raw: RawSample, file: ImageFile, rules: ImageRules, tiles: bool) -> PreparedImage:
    try:
        rgb = decode.load(file, upright=rules.upright).rgb
    except InputError as unreadable:
        check_files(raw)
        raise BrokenSample(raw.name, broken.BAD_IMAGE, unreadable.message) from None
    return views.prepare(rgb, rules, count=len(raw.images), tiles=tiles)


def _length(
    name: str, labelled: Labelled, images: Sequence[PreparedImage], rules: SampleRules
) -> int:
    """Positions of the whole sample. Raises BrokenSample if no target is within the limit."""
    _, _, labels = _laid_out(labelled, images, rules)
    if not len(scored(labels[: rules.max_length])):
        reason = f"{len(labels)} positions, {rules.max_length} are read"
        raise BrokenSample(name, broken.BEYOND, reason)
    return len(labels)


def _laid_out(
    labelled: Labelled, images: Sequence[PreparedImage], rules: SampleRules
) -> tuple[Array, Array, Array]:
    """lay_out of the whole sample; every image token takes row 0."""
    rows = [np.zeros(image_tokens(image, rules.tokens_per_view), np.int64) for image in images]
    return lay_out(labelled.runs, labelled.labels, rows, None)
