"""Which of our own kernels a language model gets: for its rows, and where faster for its attention.

It may have two forms; each is judged by the calls that it is for. Attention of few tokens is
computed in float32, that of many with products in bfloat16: as linears, it has to round its inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.engines.backends import (
    Compiled,
    Plugin,
    RunnerOptions,
    native,
    onnxruntime,
    sessions,
)
from edgevlm.engines.build import native_products
from edgevlm.engines.build.check import tolerance
from edgevlm.engines.build.timings import Timings
from edgevlm.engines.build.tune import ANSWER
from edgevlm.engines.manifest import PREFILL_CHUNK, Trial
from edgevlm.engines.native.library import BF16
from edgevlm.engines.native.library import native as library
from edgevlm.engines.profiling.roofline import question
from edgevlm.toolkit.bundle.goldens import relative_rms
from edgevlm.toolkit.errors import AccuracyError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import image_axes

IN_PROMPTS = ", prompts"  # behind the name of a language model: its second form
_ROUNDING: tuple[Precision, ...] = ("int8_rows", "int8_weights", "int4_weights")
_LONG = 24  # tokens, more than the kernel computes in float32
_RUNS = 5  # of each kernel, in turn; the shortest counts
_FASTER_BY = 0.95  # of the other's time: less is not worth a second graph


@dataclass(frozen=True)
class CachedAttention:
    """One call: so many new tokens behind others; heads of so many channels."""

    tokens: int
    cached: int
    heads: int
    kv_heads: int
    size: int
    scale: float


def chosen(
    model: ModelConfig, plan: PrecisionPlan, prompts: PrecisionPlan | None, timings: Timings | None
) -> tuple[dict[str, tuple[Plugin, ...]], list[Trial]]:
    """Our kernels by form, and what was timed. prompts: the plan of the form for prompts alone.

    timings: None to take them without measuring.
    """
    name = model.lm.name
    calls = {"prompt", "token"}
    forms = [(name, plan, {"token"} if prompts else calls)]
    forms += [(name + IN_PROMPTS, prompts, {"prompt"})] if prompts else []
    found, trials = dict[str, tuple[Plugin, ...]](), list[Trial]()
    for form, its, wanted in forms:
        precision = its.at(f"{name}/layers.0/attention/q")
        work = [call for call in _calls(model) if call.name in wanted]
        attention, timed = _attention(model, form, precision, work, timings)
        rounds = precision == "int8_rows"
        axes = [(call.axes, call.often) for call in work]
        lm = components.language_model(model)
        products, also = native_products.chosen(lm, rounds, axes, timings)
        also = [replace(trial, component=form) for trial in also]
        kernels = attention + (native.ROWS,) * rounds + products
        if kernels:
            found[form] = kernels
        trials += timed + also
    return found, trials


@dataclass(frozen=True)
class _Call:
    """A piece of a prompt, or a token: new tokens behind others; how often in one question."""

    name: str
    tokens: int
    cached: int
    often: int
    axes: Mapping[str, int]


def _calls(model: ModelConfig) -> list[_Call]:
    work = question(model)
    length, chunks = work.prompt_tokens, -(-work.prompt_tokens // PREFILL_CHUNK)
    axes = image_axes(model, work.views, work.image_tokens) | {"context": length}
    tokens = -(-length // chunks)
    return [
        _Call("prompt", tokens, (length - tokens) // 2, chunks, {**axes, "sequence": tokens}),
        _Call("token", 1, length, ANSWER, {**axes, "sequence": 1}),
    ]


def _attention(
    model: ModelConfig, form: str, precision: Precision, work: list[_Call], timings: Timings | None
) -> tuple[tuple[Plugin, ...], list[Trial]]:
    """Our kernel for attention, if a form is to have it; milliseconds are those of all layers."""
    from edgevlm.engines.lowering.native_decoder import fits

    c = model.lm.config
    suits = c.window is None and fits(c.head_dim) and library().form == BF16
    if not suits or precision not in _ROUNDING:
        return (), []
    if timings is None:
        return (native.CACHED,), []
    totals: dict[Precision, float] = {"float": 0.0, "int8_rows": 0.0}
    for call in work:
        sizes = c.num_heads, c.num_kv_heads, c.head_dim, c.head_dim**-0.5
        one = CachedAttention(call.tokens, call.cached, *sizes)
        op = f"cached attention {one} {library().path} {library().form}"
        for p, ms in timings.of_op(op, list(totals), partial(_measured, one)).items():
            totals[p] += call.often * c.num_layers * ms
    ours = totals["int8_rows"] < _FASTER_BY * totals["float"]
    trials = [
        Trial(form, "attention", p, round(ms, 3), ours == (p != "float"))
        for p, ms in totals.items()
    ]
    return (native.CACHED,) * ours, trials


def compare(compiled: Compiled, folder: Path) -> None:
    """Raise AccuracyError where a long piece of a prompt comes out too far from ONNX Runtime's own.

    Goldens are of few tokens, which the kernel for attention computes in another way.
    """
    if native.CACHED not in compiled.plugins:
        return
    plain, ours = (_long_piece(form, folder) for form in native.forms(compiled, folder))
    error, limit = relative_rms([(ours, plain)]), tolerance(compiled)
    if not error <= limit:
        raise AccuracyError(
            f"{compiled.record.name}: attention of many tokens moves logits by {error:.3g} "
            f"(relative rms), allowed {limit}"
        )


def _long_piece(form: Compiled, folder: Path) -> Array:
    """Logits after random tokens, without their mean."""
    record = form.record
    shapes = {port.name: port.shape for port in (*record.inputs, *record.outputs)}
    options = RunnerOptions(_LONG, plugins=form.plugins)
    runner = onnxruntime.open(folder, record, {}, options)
    ids = np.random.default_rng(0).integers(0, int(shapes["logits"][-1]), (1, _LONG))
    inputs: dict[str, Array] = {
        "ids": ids,
        "rows": np.full_like(ids, -1),
        "features": np.zeros((1, int(shapes["features"][-1])), np.float32),
        "start": np.zeros(1, np.int64),
        "score": np.asarray([[_LONG - 1]]),
    }
    try:
        logits = np.array(runner.run(inputs, runner.new_state())["logits"])
    finally:
        runner.close()
    return np.asarray(logits - logits.mean())


def _measured(call: CachedAttention) -> dict[Precision, float]:
    """Milliseconds of one call in each kernel, the shortest of several in turn."""
    from edgevlm.engines.lowering.native_decoder import call_cached_attention, lone_attention

    sizes = call.heads, call.kv_heads, call.size, call.scale
    plain, ours = lone_attention(*sizes), lone_attention(*sizes)
    call_cached_attention(ours)
    arrays = _arrays(call)
    graphs: dict[Precision, Any] = {"float": plain, "int8_rows": ours}
    bound = {precision: _bound(graph, arrays) for precision, graph in graphs.items()}
    best: dict[Precision, float] = dict.fromkeys(bound, float("inf"))
    for _ in range(_RUNS + 1):
        for precision, (session, binding) in bound.items():
            begun = time.perf_counter()
            session.run_with_iobinding(binding)
            best[precision] = min(best[precision], 1000 * (time.perf_counter() - begun))
    return best


def _arrays(call: CachedAttention) -> dict[str, Array]:
    random, context = np.random.default_rng(0), call.cached + call.tokens
    rows = {"q": call.heads, "k": call.kv_heads, "v": call.kv_heads}
    arrays: dict[str, Array] = {
        name: random.standard_normal((1, call.tokens, heads * call.size), np.float32)
        for name, heads in rows.items()
    }
    cache = (1, call.kv_heads, context, call.size)
    arrays |= {name: random.standard_normal(cache, np.float32) for name in ("key", "value")}
    angles = random.random((context, call.size // 2), np.float32)
    arrays |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    last, total = np.asarray([context - 1], np.int32), np.asarray(context, np.int32)
    return {**arrays, "last": last, "total": total, "y": np.empty_like(arrays["q"])}


def _bound(graph: Any, arrays: Mapping[str, Array]) -> tuple[Any, Any]:
    """A session of a graph of one attention, which updates its cache in place."""
    settings = sessions.session_options(threads_here())
    settings.register_custom_ops_library(str(library().path))
    session = sessions.open_session(graph.SerializeToString(), settings)
    binding = session.io_binding()
    outputs = {"new_key": "key", "new_value": "value", "y": "y"}
    for port in session.get_inputs():
        binding.bind_input(port.name, *_address(arrays[port.name]))
    for name, array in outputs.items():
        binding.bind_output(name, *_address(arrays[array]))
    return session, binding


def _address(array: Array) -> tuple[Any, ...]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
