"""Samples through a whole model: encoders, merger, language model, each run by given ops.

A few samples go together, so that weights are read once for all of them and products have more
rows: views of images through the encoders, and prompts of one length through the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgevlm.calibration import greedy, pieces
from edgevlm.calibration.pictures import Sample
from edgevlm.calibration.pieces import InPieces
from edgevlm.calibration.reads import SCORED, SCORED_IN_TEXT, Read, groups, read
from edgevlm.toolkit.errors import CalibrationError, InputError
from edgevlm.toolkit.images import decode, longest_side, views
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Step, Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt, PromptSequence
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import MASK_DECODER, MASK_ENCODER, Component, no_states
from edgevlm.toolkit.vlm.config import ModelConfig

ANSWER = "answer"  # the port of logits at an answer's tokens
PIXELS = 4 * 336 * 336  # of views that go through an encoder together; one may be larger

Found = dict[str, dict[str, Array]]  # what components give, by component and port


def _same(array: Any) -> Any:
    return array


@dataclass(frozen=True)
class Arithmetic:
    """Who computes: the ops, from an array to their tensors (`load`) and back (`read`)."""

    ops: Ops[Any]
    load: Callable[[Array], Any]
    read: Callable[[Any], Array]


def in_numpy() -> Arithmetic:
    """The reference's own."""
    return Arithmetic(NumpyOps(), _same, np.asarray)


@dataclass(frozen=True)
class Loaded(Mapping[str, Any]):
    """The weights of a component as tensors of the ops, each made when it is used.

    in_pieces: whether very large ones are pieces.Large, for ops inside pieces.InPieces.
    """

    weights: Mapping[str, Array]
    load: Callable[[Array], Any]
    in_pieces: bool = False

    def __getitem__(self, key: str) -> Any:
        if self.in_pieces:
            return pieces.loaded(self.weights, key, self.load)
        return self.load(self.weights[key])

    def __contains__(self, key: object) -> bool:
        return key in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Uncached(Wrapper[Any]):
    """Keeps no KV cache: a sample is read once, and the caches of a large model are large."""

    def attention_cached(
        self, q: Any, k: Any, v: Any, past: tuple[Any, Any], step: Step[Any], **sizes: Any
    ) -> tuple[Any, Any, Any]:
        return self.inner.attention_cached(q, k, v, past, step, **sizes)[0], *past


@dataclass(frozen=True)
class Passage:
    """How samples go through: the weights of each component, and the ops around `arithmetic`,
    which `wrap` makes once for each.
    """

    weights: Mapping[str, Mapping[str, Array]]
    arithmetic: Arithmetic
    wrap: Callable[[Ops[Any], Component], Any] = lambda ops, part: ops
    _made: dict[str, Any] = field(default_factory=dict)

    def run(self, part: Component, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of one component, states aside."""
        load, read = self.arithmetic.load, self.arithmetic.read
        loaded: Weights[Any] = Weights(Loaded(self.weights.get(part.name, {}), load, True))
        if part.name not in self._made:
            inner: Any = InPieces(self.arithmetic.ops, part.name)
            plain: Any = Uncached(inner, part.name)
            self._made[part.name] = self.wrap(plain, part)
        ops = self._made[part.name]
        outputs = part.forward(ops, loaded, {name: load(x) for name, x in inputs.items()})
        kept = [port.name for port in part.outputs if port.updates is None]
        return {name: np.asarray(read(outputs[name])) for name in kept}


class Chain:
    """The components of a model, connected as its edges say."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self.parts = components.components(model)
        self._lm = next(part for part in self.parts if part.name == model.lm.name)
        self._before = self.parts[: self.parts.index(self._lm)]
        self._sources = {edge.target: edge.source for edge in components.edges(model)}

    def run(self, sample: Sample, by: Passage) -> Found:
        """`run_all` of one sample."""
        return self.run_all([sample], by)[0]

    def run_all(
        self,
        samples: Sequence[Sample],
        by: Passage,
        *,
        language: bool = True,
        answers: Sequence[Array] | None = None,
    ) -> list[Found]:
        """What every component that a sample reaches gives, for each sample.

        language: whether the language model is run. Its outputs are logits at up to SCORED
        positions of the text in a prompt, or SCORED_IN_TEXT of a text, spread evenly. Its last
        layer runs for no other, so they are what shows the ranges there too. answers: tokens that
        it reads behind each sample, for logits from which each of them is chosen: ANSWER.
        """
        asked, found = self._seen(samples, by)
        self._for_masks(samples, found, by)
        if not language:
            return found
        reads = self._reads(samples, asked, found)
        ends = [one.score.size for one in reads]
        if answers is not None:
            reads = [one.answering(said) for one, said in zip(reads, answers, strict=True)]
        last = [one.score.size for one in reads]
        if answers is not None:
            reads = [self._asking(one, own) for one, own in zip(reads, found, strict=True)]
        for group in groups(reads):
            logits, hidden = self._language([reads[i] for i in group], by)
            for i, own, states in zip(group, logits, hidden, strict=True):
                found[i][self.model.lm.name] = {"logits": own[:, : ends[i]]}
                if last[i] > ends[i]:
                    found[i][self.model.lm.name][ANSWER] = own[:, ends[i] : last[i]]
                if own.shape[1] > last[i]:
                    found[i][MASK_DECODER] = self._mask(states[:, -1], found[i], by)
        return found

    def _asking(self, one: Read, found: Found) -> Read:
        """What is read, with the token that asks for a mask where an image has features for one."""
        segmenter = self.model.segmenter
        full = one.ids.shape[1] >= self.model.lm.config.context
        if segmenter is None or MASK_ENCODER not in found or full:
            return one
        token = self._tokenizer.id_of(segmenter.token)
        return one if token is None else one.closing_with(token)

    def _mask(self, state: Array, found: Found, by: Passage) -> dict[str, Array]:
        """The mask of a state [1, hidden_size]."""
        part = next(p for p in self.parts if p.name == MASK_DECODER)
        features = found[MASK_ENCODER]["features.0"]
        return by.run(part, {"hidden": state, "features": features})

    def answered(self, samples: Sequence[Sample], by: Passage) -> list[Array]:
        """Greedy answers to all samples, of greedy.ANSWER tokens, or none where these do not fit;
        by ops that nothing wraps.
        """
        asked, found = self._seen(samples, by)
        reads, part = self._reads(samples, asked, found), self._lm
        said, by_ops = [np.zeros(0, np.int64)] * len(reads), by.arithmetic
        weights = Loaded(by.weights.get(part.name, {}), by_ops.load)
        for group in groups(reads):
            inputs = self._inputs([reads[i] for i in group])
            if inputs["ids"].shape[1] + greedy.ANSWER > self.model.lm.config.context:
                continue
            ops, load, read = by_ops.ops, by_ops.load, by_ops.read
            for i, own in zip(
                group, greedy.answered(part, ops, weights, inputs, load, read), strict=True
            ):
                said[i] = own
        return said

    def _seen(
        self, samples: Sequence[Sample], by: Passage
    ) -> tuple[list[tuple[Prompt, bool] | None], list[Found]]:
        """Prompts, None of a text; what the components before the language model give."""
        asked = [None if sample.ids is not None else self._prompt(sample) for sample in samples]
        seen = [
            self._views(sample, tiles=prompt[1]) if prompt and sample.image is not None else None
            for sample, prompt in zip(samples, asked, strict=True)
        ]
        return asked, self._vision(seen, by)

    def _reads(
        self,
        samples: Sequence[Sample],
        asked: Sequence[tuple[Prompt, bool] | None],
        found: Sequence[Found],
    ) -> list[Read]:
        return [
            self._read(sample, prompt[0] if prompt else None, outputs)
            for sample, prompt, outputs in zip(samples, asked, found, strict=True)
        ]

    def check(self, sample: Sample) -> None:
        """Raise CalibrationError for a prompt that the model cannot be asked."""
        if sample.ids is not None:
            return
        try:
            self._prompt(sample)
        except InputError as odd:
            raise CalibrationError(
                f"{sample.prompt[:60]!r}: {odd.message}", hint=odd.hint
            ) from None

    def _prompt(self, sample: Sample) -> tuple[Prompt, bool]:
        """The prompt as tokens, and whether its images are cut into tiles."""
        rules, images = self.model.prompts, int(sample.image is not None)
        rendered = prompts.render(rules, [sample.prompt], images, "auto")
        prompt = prompts.tokenize(rules, self._tokenizer, rendered)
        reused = rules.reuse_last and images == 1 == prompt.images - 1  # the quirk of that name
        prompts.check_slots(prompt, images + reused)
        return prompt, rendered.tiles

    def _views(self, sample: Sample, *, tiles: bool) -> views.PreparedImage:
        assert sample.image is not None
        rgb = decode.load(sample.image, upright=self.model.images.upright).rgb
        return views.prepare(rgb, self.model.images, count=1, tiles=tiles)

    def _vision(self, seen: Sequence[views.PreparedImage | None], by: Passage) -> list[Found]:
        """What the components before the language model give for each image."""
        encoded = {
            part.name: self._encoded(part, seen, by)
            for part in self.parts
            if part.name.startswith("encoder.")
        }
        return [
            self._merged({name: each[i] for name, each in encoded.items()}, one, by) if one else {}
            for i, one in enumerate(seen)
        ]

    def _for_masks(self, samples: Sequence[Sample], found: Sequence[Found], by: Passage) -> None:
        """Add what the encoder of masks gives for each image. Their decoder stays in float: it has
        a hundredth of the work, and masks are where its logits change sign. It runs for the report.
        """
        segmenter = self.model.segmenter
        for sample, own in zip(samples, found, strict=True):
            if segmenter is not None and sample.image is not None and own:
                rgb = decode.load(sample.image, upright=self.model.images.upright).rgb
                pixels = longest_side.preprocess(rgb, segmenter.pixels)
                part = next(p for p in self.parts if p.name == MASK_ENCODER)
                own[MASK_ENCODER] = by.run(part, {"pixels": pixels[None]})

    def _encoded(
        self, part: Component, seen: Sequence[views.PreparedImage | None], by: Passage
    ) -> list[dict[str, Array]]:
        """What an encoder gives for each image; views of several images go together."""
        name = part.name.removeprefix("encoder.")
        each = [[view[name] for view in one.pixels] if one else [] for one in seen]
        pixels = [view for views_of_one in each for view in views_of_one]
        if not pixels:
            return [{} for _ in seen]
        step = max(PIXELS // math.prod(pixels[0].shape[-2:]), 1)
        runs = [
            by.run(part, {"pixels": np.stack(pixels[start : start + step])})
            for start in range(0, len(pixels), step)
        ]
        joined = {port: np.concatenate([one[port] for one in runs]) for port in runs[0]}
        ends = np.cumsum([len(one) for one in each])
        return [
            {port: array[end - len(one) : end] for port, array in joined.items()}
            for one, end in zip(each, ends, strict=True)
        ]

    def _merged(self, found: Found, seen: views.PreparedImage, by: Passage) -> Found:
        """The same with what the merger, and what stands behind it, make of one image."""
        values: dict[str, Array] = {}
        if seen.order is not None:
            values = {
                "arrangement.rows": seen.order.rows,
                "arrangement.weights": seen.order.weights,
            }
        for part in self._before:
            if part.name not in found:
                ports = [port.name for port in part.inputs]
                inputs = {port: values[self._sources[f"{part.name}:{port}"]] for port in ports}
                found[part.name] = by.run(part, inputs)
            values |= {f"{part.name}:{port}": x for port, x in found[part.name].items()}
        if seen.order is not None and "arrange" not in found:
            found["arrangement"] = {"rows": seen.order.rows[:, 0]}
        return found

    def _features(self, found: dict[str, dict[str, Array]]) -> tuple[Array, Array]:
        """The rows of an image's features, and which of them are its tokens."""
        source, port = self._sources[f"{self.model.lm.name}:features"].split(":")
        features = found[source][port]
        rows = found.pop("arrangement", {}).get("rows")
        return features, np.arange(len(features)) if rows is None else rows

    def _read(self, sample: Sample, prompt: Prompt | None, found: Found) -> Read:
        """What the language model reads of a sample."""
        if prompt is None:
            assert sample.ids is not None
            ids = sample.ids[None]
            return read(ids, np.full_like(ids, -1), None, SCORED_IN_TEXT)
        features, indices = None, list[Array]()
        if sample.image is not None:
            features, order = self._features(found)
            indices = [order] * prompt.images
        sequence: PromptSequence = prompts.assemble(prompt, indices)
        longest = min(self.model.prompts.cut or sequence.length, self.model.lm.config.context)
        sequence = sequence.first(longest)
        return read(sequence.ids, sequence.rows, features, SCORED)

    def _language(self, reads: Sequence[Read], by: Passage) -> tuple[list[Array], list[Array]]:
        """Logits [1, scored, vocabulary] of each; states [1, scored, hidden_size] where masks are
        made of them.
        """
        part, inputs = self._lm, self._inputs(reads)
        axes = {"batch": len(reads), "context": reads[0].ids.shape[1]}
        states = no_states(part.inputs, part.outputs, axes)
        outputs = by.run(part, {**inputs, **states})
        logits = outputs["logits"][:, None]
        return list(logits), list(outputs["hidden"][:, None] if "hidden" in outputs else logits)

    def _inputs(self, reads: Sequence[Read]) -> dict[str, Array]:
        """What the language model gets of samples of one length, states aside."""
        width = int(self.model.lm.config.hidden_size)
        rows, features, first = list[Array](), [np.zeros((1, width), np.float32)], 1
        for one in reads:
            rows.append(np.where(one.rows < 0, -1, one.rows + first))
            if one.features is not None:
                features.append(np.asarray(one.features, np.float32))
                first += len(one.features)
        return {
            "ids": np.concatenate([one.ids for one in reads]),
            "rows": np.concatenate(rows),
            "features": np.concatenate(features),
            "start": np.zeros(len(reads), np.int64),
            "score": np.stack([one.score for one in reads]),
        }
