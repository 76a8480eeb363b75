"""SmoothQuant without samples, for linears whose inputs are rounded by rows (int8_rows).

A row has one step for all channels, so a few large channels coarsen the others. Which channels of a
norm's output, or of a SwiGLU's, are large is the model's own: any text and any picture show it, so
a language model reads the page below and random tokens, and a tower random pixels.
docs/performance.md has what it saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from edgevlm.calibration import smooth
from edgevlm.calibration.chain import Passage, in_numpy
from edgevlm.toolkit.bundle.goldens import AXES
from edgevlm.toolkit.checkpoints.layouts.source import Source, TowerSource
from edgevlm.toolkit.ops.vocabulary import Array, Ops, Weights
from edgevlm.toolkit.ops.wrappers import Observe, Wrapper
from edgevlm.toolkit.text.tokenizer import Tokenizer
from edgevlm.toolkit.vlm.components import Component, Port, components, no_states
from edgevlm.toolkit.vlm.cost import image_axes

ALPHA = 0.5
_TOKENS = 64  # that the language model reads at a time
_WINDOWS, _RANDOM = 5, 2  # the most of the page; and of random tokens, which a build compares with
_PAGE = """The harbour was quiet when the first boats came back. Two men carried a crate of fish up
the steps, and a woman in a yellow coat counted the boxes: forty-one, twelve fewer than on Monday.
"What happened out there?" she asked. "The wind turned at six," said the older one, "and after that
we only tried to stay dry."
USER: What is in the picture, and where is the dog? ASSISTANT: It shows a street with three parked
cars, a red bicycle and a shop that sells bread. The dog sits at the left, in front of the door.
A cell divides in stages. First the chromosomes are copied, then they line up along the middle, and
finally each half is pulled to its own side; the whole process takes about 90 minutes at 37 C.
def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else 0.0
In 1998 the company had 3,200 employees and sold goods worth $41.7 million, 8% more than in 1997.
Mix 200 g of flour with two eggs, a pinch of salt and 1/4 litre of milk; let it rest for an hour.
Der Zug nach Norden hat heute zwanzig Minuten Verspaetung. Il fait froid, mais le soleil brille.
La respuesta correcta es la segunda: x = 7, porque 3x + 4 = 25.
"""


class _Rows(Wrapper[Array]):
    """All rows of an input in one product, which NumPy would compute for each window."""

    def linear(self, x: Array, w: Weights[Array]) -> Array:
        y = self.inner.linear(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], -1)


S = TypeVar("S", bound=Source | TowerSource)


def smoothed(source: S) -> S:
    """The source with weights changed where its plan has int8_rows: in float the same model."""
    axes = image_axes(source.model, 1, 1) | {"sequence": 1, "context": 1}
    weights, values = dict(source.weights), dict[str, Array]()
    windows = _windows(source) if isinstance(source, Source) else np.zeros((0, 0), np.int64)
    for part in components(source.model):
        links = [
            link
            for link in smooth.links(part, axes)
            if all(source.plan.at(path) == "int8_rows" for path in link.paths)
        ]
        if not links or part.name not in weights:
            continue
        largest = _largest(part, weights[part.name], links, values, windows)
        found = {
            link.source: smooth.scales(link, largest[link.paths[0]], weights[part.name], ALPHA)
            for link in links
        }
        weights[part.name] = smooth.smoothed(weights[part.name], found, links)
    return replace(source, weights=weights)


def _largest(
    part: Component,
    weights: Mapping[str, Array],
    links: list[smooth.Link],
    values: dict[str, Array],
    windows: Array,
) -> dict[str, Array]:
    """max|x| of each channel that the linears of a link read, by the first one's path.

    values: outputs of the components before by port, to which those of this one are added.
    """
    wanted, largest = {link.paths[0] for link in links}, dict[str, Array]()

    def see(path: str, x: Array) -> None:
        if path in wanted:
            found = np.abs(x).reshape(-1, x.shape[-1]).max(0)
            largest[path] = np.maximum(largest.get(path, found), found)

    def wrap(ops: Ops[Array], p: Component) -> Any:
        rows: Any = _Rows(ops, p.name)
        return Observe(rows, p.name, see)

    by = Passage({part.name: weights}, in_numpy(), wrap)
    generator = np.random.default_rng(0)
    decodes = any(port.updates for port in part.outputs)
    given = _read(part, windows) if decodes else _values(part, generator, values)
    outputs = by.run(part, given)
    values |= {f"{part.name.removeprefix('encoder.')}.{n}": x for n, x in outputs.items()}
    return largest


def _values(
    part: Component, generator: np.random.Generator, known: Mapping[str, Array]
) -> dict[str, Array]:
    """Pixels, or features of encoders: those that they gave, if they were run."""
    given = {}
    for port in part.inputs:
        name = ".features.".join(port.name.rsplit(".", 1))
        given[port.name] = known[name] if name in known else _normal(port, generator)
    return given


def _normal(port: Port, generator: np.random.Generator) -> Array:
    shape = [AXES[n] if isinstance(n, str) else n for n in port.shape]
    if port.dtype == "int64":
        return np.zeros(shape, np.int64)
    return generator.standard_normal(shape, np.float32)


def _windows(source: Source) -> Array:
    """The page as tokens, as far as the tokenizer can read it, and random ones: ids [N, S].

    They are read together, as weights of a large model take longer to read than to multiply.
    """
    lm = source.model.lm.config
    length = min(_TOKENS, lm.context)
    tokenizer = Tokenizer.from_text(
        source.tokenizer, source.model.prompts.sentencepiece, lm.vocab_size
    )
    ids = np.asarray(tokenizer.encode(_PAGE, special=False), np.int64)
    ids = ids[ids < lm.vocab_size]
    count = min(len(ids) // length, _WINDOWS)
    random = np.random.default_rng(0).integers(0, lm.vocab_size, (_RANDOM, length))
    return np.concatenate([ids[: count * length].reshape(count, length), random])


def _read(part: Component, ids: Array) -> dict[str, Array]:
    """The language model's inputs for prompts without images, ids [N, S]."""
    count, length = ids.shape
    width = part.shapes["embed.weight"][1]
    return {
        "ids": ids,
        "rows": np.full_like(ids, -1),
        "features": np.zeros((1, width), np.float32),
        "start": np.zeros(count, np.int64),
        "score": np.full((count, 1), length - 1),
        **no_states(part.inputs, part.outputs, {"batch": count, "context": length}),
    }
