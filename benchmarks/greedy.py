"""Greedy answers of a model before it is exported: torch, whole prompts, no cache.

What an engine must answer too, token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.images import decode, views
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.training.data.collate import collate
from edgevlm.training.data.masking import IGNORED
from edgevlm.training.data.prepare import SampleRules, rules_for
from edgevlm.training.data.sample import Sample, image_tokens
from edgevlm.training.vlm import VLM


@dataclass(frozen=True)
class Asked:
    """A question on a picture, the bytes of a file."""

    picture: bytes
    question: str


def answers(
    source: Source, asked: Sequence[Asked], *, most: int = 8, batch: int = 64
) -> list[tuple[int, ...]]:
    """The ids of each answer without the one that ends it, at most `most`."""
    model, rules = source.model, rules_for(source.model)
    text = Tokenizer.from_text(source.tokenizer, model.prompts.sentencepiece)
    vlm = VLM(model).load(source.weights).eval()
    found: list[tuple[int, ...]] = []
    with torch.inference_mode():
        for first in range(0, len(asked), batch):
            samples = [_sample(one, rules, text) for one in asked[first : first + batch]]
            found += _continued(vlm, samples, rules, most)
    return found


def _sample(asked: Asked, rules: SampleRules, text: Tokenizer) -> Sample:
    """The prompt; its labels are set anew for every token."""
    image = views.prepare(decode.load(asked.picture).rgb, rules.images, count=1)
    rendered = prompts.render(rules.text.prompts, [asked.question], 1, "auto")
    runs = prompts.tokenize(rules.text.prompts, text, rendered).runs
    length = sum(map(len, runs)) + image_tokens(image, rules.tokens_per_view)
    return Sample("question", runs, (), (image,), length)


def _continued(
    vlm: VLM, samples: Sequence[Sample], rules: SampleRules, most: int
) -> list[tuple[int, ...]]:
    said: list[tuple[int, ...]] = [() for _ in samples]
    open_ = list(range(len(samples)))
    for _ in range(most):
        if not open_:
            break
        batch = collate([_asking(samples[i], said[i]) for i in open_], rules)
        chosen = vlm(**batch)[:, 0].argmax(-1).tolist()
        ended = [token in rules.text.prompts.eos for token in chosen]
        for i, token, end in zip(open_, chosen, ended, strict=True):
            said[i] += () if end else (token,)
        open_ = [i for i, end in zip(open_, ended, strict=True) if not end]
    return said


def _asking(sample: Sample, said: tuple[int, ...]) -> Sample:
    """The sample with what was said, and one target: a stand-in for the token that comes next."""
    *before, last = sample.runs
    runs = (*before, (*last, *said, 0))
    silent = tuple((IGNORED,) * len(run) for run in before)
    labels = (*silent, (*(IGNORED,) * (len(last) + len(said)), 0))
    return Sample(sample.name, runs, labels, sample.images, sample.length + len(said) + 1)
