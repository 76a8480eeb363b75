"""A sample through a whole model: encoders, merger, language model, each run by given ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgevlm.calibration.pictures import Sample
from edgevlm.toolkit.errors import CalibrationError, InputError
from edgevlm.toolkit.images import decode, views
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.text.prompts import Prompt
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import Component, zero_states
from edgevlm.toolkit.vlm.config import ModelConfig

SCORED = 16  # positions whose logits are compared


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
    """The weights of a component as tensors of the ops, each made when it is used."""

    weights: Mapping[str, Array]
    load: Callable[[Array], Any]

    def __getitem__(self, key: str) -> Any:
        return self.load(self.weights[key])

    def __contains__(self, key: object) -> bool:
        return key in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


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
        loaded: Weights[Any] = Weights(Loaded(self.weights.get(part.name, {}), load))
        if part.name not in self._made:
            self._made[part.name] = self.wrap(self.arithmetic.ops, part)
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
        self._sources = {edge.target: edge.source for edge in components.edges(model)}

    def run(self, sample: Sample, by: Passage) -> dict[str, dict[str, Array]]:
        """What every component that the sample reaches gives, by component and port.

        The language model's are logits at up to SCORED positions of text, spread evenly.
        """
        if sample.ids is not None:
            ids = sample.ids[None]
            return self._language(ids, np.full_like(ids, -1), None, by)
        prompt, tiles = self._prompt(sample)
        found: dict[str, dict[str, Array]] = {}
        features, indices = None, list[Array]()
        if sample.image is not None:
            found = self._vision(sample, by, tiles=tiles)
            features, order = self._features(found)
            indices = [order] * prompt.images
        sequence = prompts.assemble(prompt, indices)
        longest = min(self.model.prompts.cut or sequence.length, self.model.lm.config.context)
        sequence = sequence.first(longest)
        return found | self._language(sequence.ids, sequence.rows, features, by)

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

    def _vision(self, sample: Sample, by: Passage, *, tiles: bool) -> dict[str, dict[str, Array]]:
        assert sample.image is not None
        rgb = decode.load(sample.image, upright=self.model.images.upright).rgb
        seen = views.prepare(rgb, self.model.images, count=1, tiles=tiles)
        values: dict[str, Array] = {}
        if seen.order is not None:
            values = {
                "arrangement.rows": seen.order.rows,
                "arrangement.weights": seen.order.weights,
            }
        found: dict[str, dict[str, Array]] = {}
        for part in self.parts[:-1]:
            if part.name.startswith("encoder."):
                each = [
                    by.run(part, {"pixels": view[part.name.removeprefix("encoder.")][None]})
                    for view in seen.pixels
                ]
                outputs = {port: np.concatenate([one[port] for one in each]) for port in each[0]}
            else:
                ports = [port.name for port in part.inputs]
                outputs = by.run(
                    part, {port: values[self._sources[f"{part.name}:{port}"]] for port in ports}
                )
            values |= {f"{part.name}:{port}": array for port, array in outputs.items()}
            found[part.name] = outputs
        if seen.order is not None and "arrange" not in found:
            found["arrangement"] = {"rows": seen.order.rows[:, 0]}
        return found

    def _features(self, found: dict[str, dict[str, Array]]) -> tuple[Array, Array]:
        """The rows of an image's features, and which of them are its tokens."""
        source, port = self._sources[f"{self.model.lm.name}:features"].split(":")
        features = found[source][port]
        rows = found.pop("arrangement", {}).get("rows")
        return features, np.arange(len(features)) if rows is None else rows

    def _language(
        self, ids: Array, rows: Array, features: Array | None, by: Passage
    ) -> dict[str, dict[str, Array]]:
        part, length = self.parts[-1], ids.shape[1]
        if not (rows < 0).any():
            raise CalibrationError("a prompt has no text that the model sees", hint="leave it out")
        width = int(self.model.lm.config.hidden_size)
        texts = np.flatnonzero(rows[0] < 0)  # after an image token, logits mean nothing
        spread = np.linspace(0, len(texts) - 1, min(SCORED, len(texts))).astype(np.int64)
        scored = np.unique(texts[spread])
        inputs = {
            "ids": ids,
            "rows": rows,
            "features": np.zeros((1, width), np.float32) if features is None else features,
            "start": np.zeros(1, np.int64),
            "score": scored[None],
            **zero_states(part.inputs, part.outputs, {"batch": 1, "context": length}),
        }
        return {part.name: by.run(part, inputs)}
