"""Whether a component's attention runs in our own kernel: where both are measured, in the faster.

The kernel rounds q, k and v, so it is for components whose linears round their inputs too. What it
gives is held to the same limits as any other kernel; without it the component runs as ever.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgevlm.engines.backends import Compiled, Plugin, native, onnx_files, sessions
from edgevlm.engines.build import halves, native_decoder, native_products
from edgevlm.engines.build.check import Errors
from edgevlm.engines.build.timings import Timings
from edgevlm.engines.lowering.capabilities import Decision
from edgevlm.engines.manifest import Trial
from edgevlm.engines.native.library import AVX512
from edgevlm.engines.native.library import native as library
from edgevlm.engines.profiling.roofline import question
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.errors import AccuracyError, BuildError
from edgevlm.toolkit.ops.shape_ops import ShapeOps, Spec
from edgevlm.toolkit.ops.vocabulary import Weights
from edgevlm.toolkit.ops.wrappers import Wrapper
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.target import threads_here
from edgevlm.toolkit.vlm import components, towers
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.config import ModelConfig
from edgevlm.toolkit.vlm.cost import image_axes, inputs
from edgevlm.toolkit.vlm.towers import Model

if TYPE_CHECKING:
    import onnx

_WHY = {
    native.ATTENTION: "products of q and k in 8 bits, all of a head in the cache",
    native.CACHED: "few tokens in float32, many in bfloat16; no scores behind the last token",
    native.ROWS: "rows scaled, activated or normed, and rounded in one pass over memory",
    native.PRODUCTS: "sums scaled, added and gated in registers, before they are written",
}
_ROUNDED: tuple[Precision, ...] = ("int8_rows",)  # static INT8 is held to 1e-3 of its reference
_RUNS = 5  # of each form, in turn; the shortest counts
_FASTER_BY = 0.95  # of the other's time: less is not worth a second graph
_ROUNDED_TO = 4  # channels of a head, in groups of which the kernel multiplies
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class Attention:
    """One call: rows of q, and of k and v; heads of so many channels."""

    queries: int
    keys: int
    heads: int
    size: int


class _Attentions(Wrapper[Spec]):
    """Runs a model over shapes and lists its attentions, with the path of the linear before."""

    def __init__(self, component: str) -> None:
        super().__init__(cast(Any, ShapeOps()), component)
        self.found: list[tuple[str, Attention]] = []
        self.linears = [component]
        self.plain = True

    def linear(self, x: Spec, w: Weights[Spec]) -> Spec:
        self.linears.append(self.path_of(w))
        return self.inner.linear(x, w)

    def attention(self, q: Spec, k: Spec, v: Spec, *, num_heads: int) -> Spec:
        self._add(q, k, num_heads)
        return self.inner.attention(q, k, v, num_heads=num_heads)

    def attention_rotary(
        self, q: Spec, k: Spec, v: Spec, angles: Spec, *, num_heads: int, head_dim: int
    ) -> Spec:
        self._add(q, k, num_heads)
        return self.inner.attention_rotary(q, k, v, angles, num_heads=num_heads, head_dim=head_dim)

    def attention_relative(self, q: Spec, *rest: Any, **more: Any) -> Spec:
        """Not for our kernel: its q and k have more channels than v once it is lowered."""
        self.plain = False
        return self.inner.attention_relative(q, *rest, **more)

    def _add(self, q: Spec, k: Spec, heads: int) -> None:
        size = q.shape[2] // heads
        self.found.append((self.linears[-1], Attention(q.shape[1], k.shape[1], heads, size)))


def chosen(
    model: Model,
    plan: PrecisionPlan,
    timings: Timings | None,
    prompts: PrecisionPlan | None = None,
) -> tuple[dict[str, tuple[Plugin, ...]], tuple[Trial, ...]]:
    """Our kernels by the component that they are for, and what was timed to say so.

    timings: None to take them wherever they are to be had, without measuring. Rows are always
    rounded by ours, in one pass over memory for the five of ONNX Runtime's kernels. prompts: the
    plan of a language model's second form, which stands under its name and IN_PROMPTS.
    """
    if library().path is None:
        return {}, ()
    work = question(model)
    axes = image_axes(model, work.views, work.image_tokens) | {"tiles": 1}
    lm = towers.language_model(model)
    found, trials = dict[str, tuple[Plugin, ...]](), list[Trial]()
    for component in components.components(model):
        if lm is not None and component.name == lm.name:
            continue
        calls, rounds = _calls(component, axes, plan)
        times = _times(calls, timings) if calls and timings is not None else {}
        ours = bool(calls) and (not times or times["int8_rows"] < _FASTER_BY * times["float"])
        products, timed = native_products.chosen(component, rounds, [(axes, 1)], timings)
        kernels = (native.ATTENTION,) * ours + (native.ROWS,) * rounds + products
        if kernels:
            found[component.name] = kernels
        trials += [
            Trial(component.name, "attention", p, round(ms, 3), ours == (p != "float"))
            for p, ms in times.items()
        ]
        trials += timed
    if isinstance(model, ModelConfig):
        of_lm, timed = native_decoder.chosen(model, plan, prompts, timings)
        found, trials = found | of_lm, trials + timed
    if timings is not None:
        timings.save()
    return found, tuple(trials)


def _calls(
    component: Component, axes: Mapping[str, int], plan: PrecisionPlan
) -> tuple[Counter[Attention], bool]:
    """The attentions of a component, none where one is not for our kernel; and whether any of its
    linears rounds rows.
    """
    seen = _Attentions(component.name)
    weights = Weights({key: Spec(shape) for key, shape in component.shapes.items()})
    component.forward(cast(Any, seen), weights, inputs(component, axes))
    fits = seen.plain and all(
        plan.at(path) in _ROUNDED and _suits(call) for path, call in seen.found
    )
    calls = Counter(call for _, call in seen.found) if fits else Counter[Attention]()
    return calls, any(plan.at(path) == "int8_rows" for path in seen.linears)


def _suits(call: Attention) -> bool:
    return call.size % _ROUNDED_TO == 0 and call.size <= _LARGEST_HEAD


def _times(calls: Counter[Attention], timings: Timings) -> dict[Precision, float]:
    """Milliseconds of all attentions of a view, in ONNX Runtime's kernel and in ours."""
    totals: dict[Precision, float] = {"float": 0.0, "int8_rows": 0.0}
    for call, times in calls.items():
        op = f"attention {call} {library().path} {library().form}"
        known = timings.of_op(op, list(totals), partial(_measured, call))
        for precision, ms in known.items():
            totals[precision] += times * ms
    return totals


def _measured(call: Attention) -> dict[Precision, float]:
    """Milliseconds of one call in each kernel, the shortest of several in turn."""
    from edgevlm.engines.lowering.native import call_attention, lone_attention

    width = call.heads * call.size
    random = np.random.default_rng(0)
    rows = {"q": call.queries, "k": call.keys, "v": call.keys}
    feed = {n: random.standard_normal((1, count, width), np.float32) for n, count in rows.items()}
    plain = lone_attention(width, call.heads)
    ours = lone_attention(width, call.heads)
    call_attention(ours)
    runs: dict[Precision, Callable[[], Any]] = {}
    graphs: dict[Precision, Any] = {"float": plain, "int8_rows": ours}
    for precision, graph in graphs.items():
        settings = sessions.session_options(threads_here())
        settings.register_custom_ops_library(str(library().path))
        session = sessions.open_session(graph.SerializeToString(), settings)
        runs[precision] = partial(session.run, None, feed)
    best: dict[Precision, float] = dict.fromkeys(runs, float("inf"))
    for _ in range(_RUNS + 1):
        for precision, run in runs.items():
            begun = time.perf_counter()
            run()
            best[precision] = min(best[precision], 1000 * (time.perf_counter() - begun))
    return best


def added(compiled: Compiled, folder: Path, kernels: tuple[Plugin, ...]) -> Compiled:
    """A component with a second graph, in which `kernels` of ours compute what they can."""
    large = (folder / compiled.record.weights).stat().st_size > memory.WHOLE_BYTES
    if large or not kernels:  # what is compared in pieces has one graph
        return compiled
    if native.UPCAST in kernels:
        return halves.added(compiled, folder)
    model = onnx_files.read_graph(folder / compiled.record.graph)
    calls = _calls_by_kernel(compiled)
    counts = {kernel: calls[kernel](model) for kernel in kernels}
    used = tuple(kernel for kernel, count in counts.items() if count)
    if not used:
        return compiled
    second = native.second_graph(compiled.record.graph)
    (folder / second).write_bytes(model.SerializeToString())
    return replace(
        compiled,
        files=(*compiled.files, second),
        lowering=(*compiled.lowering, *(_decision(compiled, k, counts[k]) for k in used)),
        plugins=(*compiled.plugins, *used),
    )


def _calls_by_kernel(compiled: Compiled) -> dict[Plugin, Callable[[onnx.ModelProto], int]]:
    """What puts calls of a kernel into a component's graph; it returns how many."""
    from edgevlm.engines.lowering import native as calls
    from edgevlm.engines.lowering import native_decoder as of_lm
    from edgevlm.engines.lowering.native_products import call_products

    def rows(model: onnx.ModelProto) -> int:
        decodes = any(port.updates for port in compiled.record.outputs)
        decodes = decodes and library().form in AVX512
        return (of_lm.call_decoder_rows(model) if decodes else 0) + calls.call_rows(model)

    return {
        native.ATTENTION: calls.call_attention,
        native.CACHED: of_lm.call_cached_attention,
        native.ROWS: rows,
        native.PRODUCTS: call_products,
    }


def _decision(compiled: Compiled, kernel: Plugin, count: int) -> Decision:
    into = f"{kernel.namespace}.{kernel.name}"
    why = f"{_WHY[kernel]}; where our kernels cannot be had, as above"
    return Decision(compiled.record.name, f"edgevlm.{kernel.op}", count, "swap", into, why)


def checked(
    compiled: list[Compiled],
    folder: Path,
    check: Callable[[list[Compiled]], Errors],
    progress: Callable[[str], None],
) -> tuple[list[Compiled], Errors]:
    """What `check` finds; where it raises AccuracyError, or a graph cannot run, once more without
    our kernels.
    """
    try:
        errors = check(compiled)
        for component in compiled:
            native_decoder.compare(component, folder)
        return compiled, errors
    except (AccuracyError, BuildError) as beyond:
        if not any(map(native.is_ours, (p for c in compiled for p in c.plugins))):
            raise
        progress(f"without our own kernels: {beyond.message}")
    plain = [without(component, folder) for component in compiled]
    return plain, check(plain)


def without(compiled: Compiled, folder: Path) -> Compiled:
    """The component as it was before."""
    second = native.second_graph(compiled.record.graph)
    (folder / second).unlink(missing_ok=True)
    return replace(
        compiled,
        files=tuple(name for name in compiled.files if name != second),
        lowering=tuple(
            line
            for line in compiled.lowering
            if not line.into.startswith(native.ATTENTION.namespace)
        ),
        plugins=tuple(plugin for plugin in compiled.plugins if not native.is_ours(plugin)),
    )
