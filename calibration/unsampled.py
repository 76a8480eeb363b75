"""SmoothQuant without samples, for linears whose inputs are rounded by rows (int8_rows).

A row has one step for all channels, so a few large channels coarsen the others. Which channels of a
norm's output, or of a SwiGLU's, are large is the model's own: random pixels and tokens show it as
text and photographs do. docs/performance.md has what it saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgevlm.calibration import smooth
from edgevlm.calibration.chain import Passage, in_numpy
from edgevlm.toolkit.bundle.goldens import AXES
from edgevlm.toolkit.checkpoints.layouts.source import Source
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.ops.wrappers import Observe
from edgevlm.toolkit.vlm.components import Component, Port, components, zero_states
from edgevlm.toolkit.vlm.cost import image_axes

ALPHA = 0.5
_TOKENS, _WINDOWS = 64, 4  # that the language model reads


def smoothed(source: Source) -> Source:
    """The source with weights changed where its plan has int8_rows: in float the same model."""
    axes = image_axes(source.model, 1, 1) | {"sequence": 1, "context": 1}
    weights, values = dict(source.weights), dict[str, Array]()
    for part in components(source.model):
        links = [
            link
            for link in smooth.links(part, axes)
            if all(source.plan.at(path) == "int8_rows" for path in link.paths)
        ]
        if not links or part.name not in weights:
            continue
        largest = _largest(part, weights[part.name], links, values)
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
) -> dict[str, Array]:
    """max|x| of each channel that the linears of a link read, by the first one's path.

    values: outputs of the components before by port, to which those of this one are added.
    """
    wanted, largest = {link.paths[0] for link in links}, dict[str, Array]()

    def see(path: str, x: Array) -> None:
        if path in wanted:
            found = np.abs(x).reshape(-1, x.shape[-1]).max(0)
            largest[path] = np.maximum(largest.get(path, found), found)

    by = Passage({part.name: weights}, in_numpy(), lambda ops, p: Observe(ops, p.name, see))
    generator = np.random.default_rng(0)
    decodes = any(port.updates for port in part.outputs)
    for _ in range(_WINDOWS if decodes else 1):
        given = _tokens(part, generator) if decodes else _values(part, generator, values)
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


def _tokens(part: Component, generator: np.random.Generator) -> dict[str, Array]:
    """A prompt of random tokens, without images."""
    vocab, width = part.shapes["embed.weight"]
    ids = generator.integers(0, vocab, (1, _TOKENS))
    return {
        "ids": ids,
        "rows": np.full_like(ids, -1),
        "features": np.zeros((1, width), np.float32),
        "start": np.zeros(1, np.int64),
        "score": np.full((1, 1), _TOKENS - 1),
        **zero_states(part.inputs, part.outputs, {"batch": 1, "context": _TOKENS}),
    }
