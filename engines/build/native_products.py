"""Whether products with rounded rows run in our own kernel: of a component, where all of its
products together are faster there, what scales their sums included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.engines.backends import Plugin, native, sessions
from edgevlm.engines.build.timings import Product, Timings
from edgevlm.engines.build.tune import products_of
from edgevlm.engines.manifest import Trial
from edgevlm.engines.native.library import AVX512
from edgevlm.engines.native.library import native as library
from edgevlm.toolkit.quantization.plan import Precision
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm.components import Component

if TYPE_CHECKING:
    import onnx

_FASTER_BY = 0.95  # of the other's time: less is not worth a kernel of our own
_BYTES, _MOST_COPIES = 48_000_000, 24  # of weights: more than caches have
_RUNS = 5  # of each kernel, in turn; the shortest counts


def chosen(
    component: Component,
    rounds: bool,
    calls: Sequence[tuple[Mapping[str, int], int]],
    timings: Timings | None,
) -> tuple[tuple[Plugin, ...], list[Trial]]:
    """Our kernel for products, if a component is to have it, and what was timed to say so.

    rounds: whether its linears round their rows. calls: what is called how often, by its axes.
    timings: None to take the kernel without measuring.
    """
    if not rounds or library().form not in AVX512:
        return (), []
    if timings is None:
        return (native.PRODUCTS,), []
    totals: dict[Precision, float] = {"float": 0.0, "int8_rows": 0.0}
    for axes, often in calls:
        for product, times in products_of(component, axes).items():
            for precision, ms in _known(product, timings).items():
                totals[precision] += often * times * ms
    ours = totals["int8_rows"] < _FASTER_BY * totals["float"]
    trials = [
        Trial(component.name, "products", p, round(ms, 3), ours == (p != "float"))
        for p, ms in totals.items()
    ]
    return (native.PRODUCTS,) * ours, trials


def _known(product: Product, timings: Timings) -> dict[Precision, float]:
    """Milliseconds of one product: "float" in ONNX Runtime's kernel, "int8_rows" in ours."""
    op = f"product {product} {library().path} {library().form}"
    return timings.of_op(op, ("float", "int8_rows"), partial(_measured, product))


def _measured(product: Product) -> dict[Precision, float]:
    from edgevlm.engines.lowering.native_decoder import call_decoder_rows
    from edgevlm.engines.lowering.native_products import call_products, lone_products

    copies = min(max(_BYTES // (product.inputs * product.outputs), 1), _MOST_COPIES)
    plain = lone_products(product.inputs, product.outputs, copies)
    call_decoder_rows(plain)
    ours = type(plain)()
    ours.CopyFrom(plain)
    call_products(ours)
    shape = product.rows, product.inputs
    feed = {
        "codes": np.random.default_rng(1).integers(1, 256, shape, np.uint8),
        "steps": np.full((product.rows, 1), 0.01, np.float32),
    }
    opened = {}
    graphs: dict[Precision, onnx.ModelProto] = {"float": plain, "int8_rows": ours}
    for precision, graph in graphs.items():
        settings = sessions.session_options(threads_here())
        settings.register_custom_ops_library(str(library().path))
        opened[precision] = sessions.open_session(graph.SerializeToString(), settings)
    best: dict[Precision, float] = dict.fromkeys(opened, float("inf"))
    for _ in range(_RUNS + 1):
        for precision, session in opened.items():
            begun = time.perf_counter()
            session.run(None, feed)
            best[precision] = min(best[precision], 1000 * (time.perf_counter() - begun) / copies)
    return best
