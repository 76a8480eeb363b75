"""A vision-language model as components and edges: encoders -> merger -> language model, and
behind it what makes masks of an answer, if the model has that.

A component is the unit that is recorded, built, timed and replaced. Axes that change from call
to call are strings: tiles (images or tiles of them), rows (image tokens of a prompt), batch,
sequence, scored, context (length of the KV cache), masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgevlm.toolkit import models
from edgevlm.toolkit.models.recipes import Recipe
from edgevlm.toolkit.ops.vocabulary import Array, Ops, T, Weights
from edgevlm.toolkit.vlm.config import ComponentConfig, ModelConfig, Segmenter
from edgevlm.toolkit.vlm.towers import Model, TowerConfig

Dim = int | str
ARRANGE = "arrange"
EMBEDDING = "embedding"  # the output of a tower by itself
MASK_ENCODER, MASK_DECODER = "segmenter.encoder", "segmenter.decoder"
MASK_PIXELS = "images.segmenter"
GOLDEN_TOKENS = 7  # tokens of a bundle's golden inputs: the shortest context that can be checked
Forward = Callable[[Ops[Any], Weights[Any], Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Port:
    """An input or output. dtype "float" is the model's own precision.

    `updates` on an output names the input that it replaces in the next call: a KV cache.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    updates: str | None = None


@dataclass(frozen=True)
class Component:
    """A part of the model that is recorded and built on its own.

    shapes: of its weights, by name. forward: a plain function of ops, weights and inputs.
    """

    name: str
    forward: Forward
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class Edge:
    """The output of one component is the input of another: "encoder.clip:features.0"."""

    source: str
    target: str


def zero_states(
    inputs: Sequence[Port], outputs: Sequence[Port], axes: Mapping[str, int]
) -> dict[str, Array]:
    """Empty states (the KV cache), float32, by the input that reads each.

    axes: the lengths of "batch" and "context".
    """
    names = {port.updates for port in outputs if port.updates}
    return {
        port.name: np.zeros([axes[n] if isinstance(n, str) else n for n in port.shape], np.float32)
        for port in inputs
        if port.name in names
    }


def no_states(
    inputs: Sequence[Port], outputs: Sequence[Port], axes: Mapping[str, int]
) -> dict[str, Array]:
    """`zero_states` for a single call whose new states nobody keeps: one array of each shape."""
    made: dict[tuple[Dim, ...], Array] = {}
    names = {port.updates for port in outputs if port.updates}
    ports = [port for port in inputs if port.name in names]
    for port in ports:
        shape = [axes[n] if isinstance(n, str) else n for n in port.shape]
        if port.shape not in made:
            made[port.shape] = np.zeros(shape, np.float32)
    return {port.name: made[port.shape] for port in ports}


def components(c: Model) -> tuple[Component, ...]:
    """All components of a model, in the order in which they run."""
    if isinstance(c, TowerConfig):
        return (tower_component(c),)
    order = c.images.arrangement
    merger = merger_component(c.merger, c.encoders, newline=bool(order and order.newline))
    vision = [*map(encoder_component, c.encoders), merger]
    if order and order.computes:
        vision.append(arrange_component(c.merger.config.outputs, largest=order.pool))
    if c.segmenter is None:
        return (*vision, language_model(c))
    behind = encoder_component(c.segmenter.encoder, MASK_ENCODER), mask_component(c.segmenter)
    return (*vision, language_model(c), *behind)


def language_model(c: ModelConfig) -> Component:
    """The language model; its states are an output where masks are made of them."""
    return lm_component(c.lm, hidden=c.segmenter is not None)


def one_image_each(c: Model) -> frozenset[str]:
    """The components that see one image at a time, or one view of it."""
    masks = [MASK_ENCODER] if c.segmenter else []
    return frozenset([*(f"encoder.{encoder.name}" for encoder in c.encoders), *masks])


def after_answer(c: Model) -> frozenset[str]:
    """The components that run behind the last token of an answer, if they run at all."""
    return frozenset([MASK_ENCODER, MASK_DECODER] if c.segmenter else [])


def edges(c: Model) -> tuple[Edge, ...]:
    """How the components connect.

    Sources that are no component are "images.NAME", the pixels of that encoder, and
    "arrangement.rows" and "arrangement.weights" of edgevlm.toolkit.images.tiling.ArrangedTokens.
    """
    return (*_edges_to_answer(c), *_edges_behind(c))


def _edges_behind(c: Model) -> tuple[Edge, ...]:
    """From the answer to its masks."""
    if c.segmenter is None:
        return ()
    assert isinstance(c, ModelConfig)
    return (
        Edge(MASK_PIXELS, f"{MASK_ENCODER}:pixels"),
        Edge(f"{c.lm.name}:hidden", f"{MASK_DECODER}:hidden"),
        Edge(f"{MASK_ENCODER}:features.0", f"{MASK_DECODER}:features"),
    )


def _edges_to_answer(c: Model) -> tuple[Edge, ...]:
    edges = [Edge(f"images.{e.name}", f"encoder.{e.name}:pixels") for e in c.encoders]
    if isinstance(c, TowerConfig):
        return tuple(edges)
    for encoder in c.encoders:
        for i in range(len(encoder.config.hidden_sizes)):
            port = f"merger:{encoder.name}.{i}"
            edges.append(Edge(f"encoder.{encoder.name}:features.{i}", port))
    if not (c.images.arrangement and c.images.arrangement.computes):
        return (*edges, Edge("merger:features", "lm:features"))
    edges += [Edge(f"arrangement.{name}", f"{ARRANGE}:{name}") for name in ("rows", "weights")]
    edges.append(Edge("merger:features", f"{ARRANGE}:features"))
    return (*edges, Edge(f"{ARRANGE}:tokens", "lm:features"))


def tables(c: ModelConfig) -> dict[str, Mapping[str, Recipe]]:
    """For each component, the names of its tensors in the published format of its architecture."""
    encoders = {f"encoder.{e.name}": models.encoder(e.kind).names(e.config) for e in c.encoders}
    merger = models.merger(c.merger.kind).names(c.merger.config)
    behind = {}
    if c.segmenter is not None:
        e, d = c.segmenter.encoder, c.segmenter.decoder
        behind[MASK_ENCODER] = models.encoder(e.kind).names(e.config)
        behind[MASK_DECODER] = models.segmenter(d.kind).names(d.config)
    lm = models.lm(c.lm.kind).names(c.lm.config)
    return {**encoders, "merger": merger, "lm": lm, **behind}


def encoder_component(encoder: ComponentConfig, name: str | None = None) -> Component:
    """One encoder: pixels in, one output per tap."""
    file, c = models.encoder(encoder.kind), encoder.config

    def forward(op: Ops[T], w: Weights[T], inputs: Mapping[str, T]) -> dict[str, T]:
        outputs = file.forward(op, c, w, inputs["pixels"])
        return {f"features.{i}": x for i, x in enumerate(outputs)}

    return Component(
        name or f"encoder.{encoder.name}",
        forward,
        file.shapes(c),
        (Port("pixels", "float", ("tiles", 3, *c.pixels)),),
        tuple(
            Port(f"features.{i}", "float", ("tiles", c.tokens, hidden_size))
            for i, hidden_size in enumerate(c.hidden_sizes)
        ),
    )


def tower_component(c: TowerConfig) -> Component:
    """An encoder by itself: pixels of one size in, one embedding for each image out."""
    file, config = models.tower(c.encoder.kind), c.encoder.config

    def forward(op: Ops[T], w: Weights[T], inputs: Mapping[str, T]) -> dict[str, T]:
        return {EMBEDDING: file.embed(op, config, w, inputs["pixels"], c.pooling)}

    return Component(
        f"encoder.{c.encoder.name}",
        forward,
        file.embed_shapes(config, c.pooling),
        (Port("pixels", "float", ("tiles", 3, *c.pixels)),),
        (Port(EMBEDDING, "float", ("tiles", c.channels)),),
    )


def merger_component(
    merger: ComponentConfig, encoders: tuple[ComponentConfig, ...], *, newline: bool = False
) -> Component:
    """The merger: the outputs of every encoder in, rows of image tokens out.

    newline: whether the learned token that ends rows of tokens is appended as one more row.
    """
    file, c = models.merger(merger.kind), merger.config
    ports = tuple(
        Port(f"{encoder.name}.{i}", "float", ("tiles", encoder.config.tokens, hidden_size))
        for encoder in encoders
        for i, hidden_size in enumerate(encoder.config.hidden_sizes)
    )

    def forward(op: Ops[T], w: Weights[T], inputs: Mapping[str, T]) -> dict[str, T]:
        merged = file.forward(op, c, w, [inputs[port.name] for port in ports])
        rows = op.reshape(merged, (-1, c.outputs))
        if newline:
            rows = op.concat([rows, op.reshape(w["newline"], (1, c.outputs))], 0)
        return {"features": rows}

    outputs = (Port("features", "float", ("rows", c.outputs)),)
    shapes = file.shapes(c) | ({"newline": (c.outputs,)} if newline else {})
    return Component("merger", forward, shapes, ports, outputs)


def arrange_component(hidden_size: int, *, largest: bool) -> Component:
    """Tokens gathered from feature rows by the indices and weights of tiling.arrange.

    largest: take the maximum of the rows instead of their weighted sum.
    """

    def forward(op: Ops[T], w: Weights[T], inputs: Mapping[str, T]) -> dict[str, T]:
        x, rows = inputs["features"], inputs["rows"]
        mixed = (
            op.max_gather(x, rows) if largest else op.weighted_gather(x, rows, inputs["weights"])
        )
        return {"tokens": mixed}

    inputs = (
        Port("features", "float", ("rows", hidden_size)),
        Port("rows", "int64", ("placed", 4)),
        Port("weights", "float", ("placed", 4)),
    )
    outputs = (Port("tokens", "float", ("placed", hidden_size)),)
    return Component(ARRANGE, forward, {}, inputs, outputs)


def mask_component(segmenter: Segmenter) -> Component:
    """From states of the language model, and features of each one's image, to masks."""
    file, c = models.segmenter(segmenter.decoder.kind), segmenter.decoder.config

    def forward(op: Ops[T], w: Weights[T], inputs: Mapping[str, T]) -> dict[str, T]:
        return {"masks": file.forward(op, c, w, inputs["hidden"], inputs["features"])}

    inputs = (
        Port("hidden", "float", ("masks", c.hidden_size)),
        Port("features", "float", ("masks", c.tokens, c.width)),
    )
    outputs = (Port("masks", "float", ("masks", c.side, c.side)),)
    return Component(MASK_DECODER, forward, file.shapes(c), inputs, outputs)


def lm_component(lm: ComponentConfig, *, hidden: bool = False) -> Component:
    """The language model with its embedding, cache and output layer.

    hidden: whether the states that logits are computed from are an output too.
    """
    file, c = models.lm(lm.kind), lm.config
    cache = ("batch", c.num_kv_heads, "context", c.head_dim)
    names = [f"{i}.{kind}" for i in range(c.num_layers) for kind in ("key", "value")]

    def forward(op: Ops[T], w: Weights[T], inputs: Mapping[str, T]) -> dict[str, T]:
        past = [(inputs[f"past.{i}.key"], inputs[f"past.{i}.value"]) for i in range(c.num_layers)]
        x, present = file.hidden(op, c, w, inputs, past)
        flat = [tensor for pair in present for tensor in pair]
        scored = {"logits": file.logits(op, c, w, x)} | ({"hidden": x} if hidden else {})
        return scored | {
            f"present.{name}": tensor for name, tensor in zip(names, flat, strict=True)
        }

    return Component(
        lm.name,
        forward,
        file.shapes(c),
        (
            Port("ids", "int64", ("batch", "sequence")),
            Port("rows", "int64", ("batch", "sequence")),
            Port("features", "float", ("rows", c.hidden_size)),
            Port("start", "int64", ("batch",)),
            Port("score", "int64", ("batch", "scored")),
            *(Port(f"past.{name}", "float", cache) for name in names),
        ),
        (
            Port("logits", "float", ("batch", "scored", c.vocab_size)),
            *([Port("hidden", "float", ("batch", "scored", c.hidden_size))] if hidden else []),
            *(Port(f"present.{n}", "float", cache, updates=f"past.{n}") for n in names),
        ),
    )
