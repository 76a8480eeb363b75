"""Float weights that fit into 16 bits stay in them: half the file, half of the memory, no loss.

Published checkpoints are fp16 or bf16, while a processor multiplies in float32. ONNX Runtime would
convert such weights when it loads them; our kernel does so each time it reads one. Where the kernel
cannot be had, ONNX Runtime converts them as ever: the same graph with a Cast behind each weight.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgevlm.engines.backends import Compiled, Plugin, native, onnx_files, sessions
from edgevlm.engines.build.timings import Timings
from edgevlm.engines.build.tune import ANSWER
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.engines.manifest import PREFILL_CHUNK, Trial
from edgevlm.engines.native.library import AVX512
from edgevlm.engines.native.library import native as library
from edgevlm.engines.profiling.roofline import question
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.safetensors_io import Entry, SafetensorsFile, row_blocks
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Precision
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import count, image_axes

_WHY = "weights stay in 16 bits and are upcast while they are read"
_VECTORS = ("avx2", "avx-vnni", *AVX512)  # forms of the library in which it is written
_FORMATS = ("bf16", "fp16")
_ROWS_TRIED = 4  # of each matrix, to see whether more is worth reading
_LEAST_BYTES = 16_000_000  # of float32 matrices: smaller components lie in a cache
_BYTES = 96_000_000  # of float32 weights that are timed at a time
_LARGEST_BYTES = 1 << 28  # of a larger matrix a part is timed
_SECONDS, _LEAST, _MOST = 0.3, 3, 30  # of one measurement, and its runs
_UPCAST = ", weights in "  # behind the call, in the table of what was timed


@dataclass(frozen=True)
class Product:
    """rows [rows, inputs] times a weight [inputs, outputs], or its transposed."""

    rows: int
    inputs: int
    outputs: int
    transposed: bool


def format_of(values: Array) -> str | None:
    """bf16 or fp16 if float32 values are all to be had in it, bit by bit; else None."""
    return next(
        (kind for kind in _FORMATS if all(_fits(b, kind) for b in row_blocks(values))), None
    )


def _fits(values: Array, kind: str) -> bool:
    bits = np.ascontiguousarray(values).view(np.uint32)
    if kind == "bf16":
        return not np.bitwise_and(bits, 0xFFFF).any()
    with np.errstate(over="ignore", invalid="ignore"):
        back = values.astype(np.float16).astype(np.float32)
    return np.array_equal(back.view(np.uint32), bits)


# -- whether it pays -------------------------------------------------------------------------


def chosen(
    bundle: Bundle, timings: Timings | None, progress: Callable[[str], None]
) -> tuple[dict[str, tuple[Plugin, ...]], tuple[Trial, ...]]:
    """The components of a float bundle whose weights are to stay in 16 bits, and what was timed.

    timings: None to take every component with such weights, without measuring.
    """
    found, trials = dict[str, tuple[Plugin, ...]](), list[Trial]()
    if library().form not in _VECTORS:
        return found, ()
    for component, record in zip(
        components.components(bundle.model), bundle.manifest.components, strict=True
    ):
        weights = SafetensorsFile(bundle.path / record.weights)
        kind = _common_format(weights)
        too_large = weights.path.stat().st_size > memory.WHOLE_BYTES
        if kind is None or too_large:
            continue
        calls = _calls(bundle, component)
        times = dict[str, tuple[float, float]]()
        if timings is not None:
            progress(f"{component.name}: timing weights in {kind}")
            times = {call: _times(products, kind, timings) for call, products in calls.items()}
        takes = [sum(_weight(c) * ms[form] for c, ms in times.items()) for form in (0, 1)]
        ours = takes[1] <= takes[0]
        if ours:
            found[component.name] = (native.UPCAST,)
        for call, both in times.items():
            named = (call, False), (f"{call}{_UPCAST}{kind}", True)
            trials += [
                Trial(component.name, name, "float", round(ms, 3), ours == in_halves)
                for (name, in_halves), ms in zip(named, both, strict=True)
            ]
    if timings is not None:
        timings.save()
    return found, tuple(trials)


def _common_format(file: SafetensorsFile) -> str | None:
    """The format that most elements of a file's matrices fit into, by a few rows of each; None
    where that is none, or where there is little to be had.
    """
    found: Counter[str | None] = Counter()
    for name, entry in file.entries.items():
        if len(entry.shape) == 2:
            found[_format_at_first_sight(file, name, entry)] += entry.elements
    if not found or 4 * sum(found.values()) < _LEAST_BYTES:
        return None
    return found.most_common(1)[0][0]


def _format_at_first_sight(file: SafetensorsFile, name: str, entry: Entry) -> str | None:
    if entry.dtype in _FORMATS:
        return entry.dtype
    return format_of(file.read(name)[:_ROWS_TRIED]) if entry.dtype == "fp32" else None


def _calls(bundle: Bundle, component: Component) -> dict[str, Counter[Product]]:
    """A component's products for one question, by the call: a view, or the prompt and a token."""
    model = bundle.model
    work, lm = question(model), towers.language_model(model)
    axes = image_axes(model, work.views, work.image_tokens)
    if lm is None or component.name != lm.name:
        one = {"tiles": 1} if component.name in components.one_image_each(model) else {}
        return {"view": _products(component, {**axes, **one})}
    length = work.prompt_tokens
    chunks = -(-length // PREFILL_CHUNK)
    prompt, token = (
        _products(component, {**axes, "sequence": n, "context": length})
        for n in (-(-length // chunks), 1)
    )
    return {"prompt": Counter({p: n * chunks for p, n in prompt.items()}), "token": token}


def _weight(call: str) -> int:
    """How often a call is made for one question."""
    return ANSWER if call == "token" else 1


def _products(component: Component, axes: Mapping[str, int]) -> Counter[Product]:
    found: Counter[Product] = Counter()
    for cost in count(component, axes).costs:
        if cost.op in ("linear", "unembed") and cost.matrix_elements:
            outputs = cost.matrix_elements // cost.matrix_inputs
            rows = cost.written_elements // outputs
            found[Product(rows, cost.matrix_inputs, outputs, cost.op == "unembed")] += 1
    return found


def _times(products: Counter[Product], kind: str, timings: Timings) -> tuple[float, float]:
    """Milliseconds of all products with weights in float32, and in 16 bits."""
    whole = halved = 0.0
    for product, times in products.items():
        part = min(product.outputs, max(_LARGEST_BYTES // (4 * product.inputs), 1))
        share = product.outputs / part
        first, second = _known(replace(product, outputs=part), kind, timings)
        whole, halved = whole + times * share * first, halved + times * share * second
    return whole, halved


def _known(product: Product, kind: str, timings: Timings) -> Iterable[float]:
    measured = cache(partial(_measured, product, kind))

    def form(at: int) -> dict[Precision, float]:
        return {"float": measured()[at]}

    for at, stored in enumerate(("fp32", f"{kind} {library().path} {library().form}")):
        op = f"{product} with weights in {stored} beside {kind}"
        yield timings.of_op(op, ["float"], partial(form, at))["float"]


def _measured(product: Product, kind: str) -> tuple[float, float]:
    """Milliseconds of one product in each form, the shortest of several in turn."""
    from edgevlm.engines.lowering.halves import TYPES, call_upcast, lone_products

    values = np.random.default_rng(0).standard_normal(product.inputs * product.outputs, np.float32)
    halved = values.astype(np.float16) if kind == "fp16" else values.view(np.uint16)[1::2].copy()
    copies = min(max(_BYTES // values.nbytes, 1), 24)
    shape = product.inputs, product.outputs, copies, product.transposed
    plain = lone_products(*shape, values.tobytes(), 1)
    ours = lone_products(*shape, halved.tobytes(), TYPES[kind])
    call_upcast(ours)
    x = np.random.default_rng(1).standard_normal((product.rows, product.inputs), np.float32)
    runs = [partial(_session(graph).run, None, {"x": x}) for graph in (plain, ours)]
    best, begun = [float("inf")] * 2, time.perf_counter()
    for run in range(_MOST):
        for at, work in enumerate(runs):
            start = time.perf_counter()
            work()
            best[at] = min(best[at], time.perf_counter() - start)
        if run >= _LEAST and time.perf_counter() - begun > _SECONDS:
            break
    first, second = (round(1000 * seconds / copies, 5) for seconds in best)
    return first, second


def _session(graph: Any) -> Any:
    settings = sessions.session_options(threads_here())
    settings.register_custom_ops_library(str(library().path))
    return sessions.open_session(graph.SerializeToString(), settings)


# -- how -------------------------------------------------------------------------------------


def added(compiled: Compiled, folder: Path) -> Compiled:
    """A component whose weights lie in 16 bits where they fit, with a graph for our kernel beside
    the one for ONNX Runtime's.
    """
    from edgevlm.engines.lowering.halves import call_upcast, narrow

    record = compiled.record
    model = onnx_files.read_graph(folder / record.graph)
    file = SafetensorsFile(folder / record.weights)
    stored = onnx_files.stored(file, model)
    formats = _formats(model, file, stored)
    if not formats:
        return compiled
    narrow(model, formats)
    changes = {
        stored[tensor][0]: onnx_files.Change(kind, stored[tensor][1].shape)
        for tensor, kind in formats.items()
    }
    with TemporaryDirectory(dir=folder) as whole:
        file.path.replace(Path(whole) / record.weights)
        onnx_files.write(Path(whole), folder, record, model, changes, anew=True)
    count, second = call_upcast(model), native.second_graph(record.graph)
    (folder / second).write_bytes(model.SerializeToString())
    kernel = native.UPCAST
    into = f"{kernel.namespace}.{kernel.name}"
    why = f"{_WHY}; where our kernels cannot be had, when they are loaded"
    kinds = " and ".join(sorted(set(formats.values())))
    return replace(
        compiled,
        files=(*compiled.files, second),
        notes=(
            *compiled.notes,
            f"{len(formats)} matrices in {kinds}, which holds all their values",
        ),
        lowering=(*compiled.lowering, Decision(record.name, kernel.op, count, "swap", into, why)),
        plugins=(*compiled.plugins, kernel),
    )


def _formats(
    model: Any, file: SafetensorsFile, stored: Mapping[str, tuple[str, Entry]]
) -> dict[str, str]:
    """Into which 16 bits the graph's matrices fit, by their names there."""
    from edgevlm.engines.lowering.halves import candidates

    read = Counter(name for name, _ in stored.values())
    found = dict[str, str]()
    for tensor in candidates(model):
        name, entry = stored[tensor]
        kind = format_of(file.read(name)) if entry.dtype == "fp32" and read[name] == 1 else None
        if kind is not None:
            found[tensor] = kind
    return found
