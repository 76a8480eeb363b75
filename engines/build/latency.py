"""How long the components of two bundles of one model take on this machine, beside each other.

Each component is lowered as a build lowers it, and opened and run as an engine does, with the calls
of one question: a view of an image of 640 x 480, its tokens and 32 of text as a prompt, and a token
behind that. Inputs are random, which changes no time. Calls of the two are made in turn, so that
what else the machine does meets both; medians count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgevlm.engines import backends
from edgevlm.engines.backends import Runner, RunnerOptions
from edgevlm.engines.backends.state import State
from edgevlm.engines.build import shapes
from edgevlm.engines.manifest import PREFILL_CHUNK
from edgevlm.engines.profiling.roofline import question
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.memory import Estimate
from edgevlm.toolkit.bundle.atomic import require_space
from edgevlm.toolkit.bundle.manifest import Bundle, ComponentRecord
from edgevlm.toolkit.checkpoints.safetensors_io import STORAGE
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import Target, this_cpu
from edgevlm.toolkit.vlm import towers
from edgevlm.toolkit.vlm.components import Port
from edgevlm.toolkit.vlm.cost import image_axes
from edgevlm.toolkit.vlm.towers import Model

Calls = Sequence[Mapping[str, Array]]
_SECONDS = 6.0  # of one call of a component, in both bundles
_LEAST, _MOST = 3, 25  # runs


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call of a component: "view" (of all of an image, behind the encoders),
    "prompt" or "token".
    """

    component: str
    call: str
    before_ms: float
    after_ms: float

    @property
    def speedup(self) -> float:
        """How many times as fast it is after."""
        return self.before_ms / max(self.after_ms, 1e-6)


def measured(before: Path, after: Path, progress: Callable[[str], None]) -> tuple[Latency, ...]:
    """Every component of a bundle and of the same model in another precision.

    Takes the disk space of the two forms of a component, and memory for both. Raises OutputError or
    OutOfMemory where there is none.
    """
    bundles, found = (Bundle.open(before), Bundle.open(after)), list[Latency]()
    target = this_cpu()
    for record in bundles[0].manifest.components:
        progress(f"{record.name}: timing it before and after")
        _require(bundles, record.name, target, before)
        with TemporaryDirectory() as folder, ExitStack() as opened:
            runners = [
                _open(bundle, record.name, Path(folder) / str(i), target)
                for i, bundle in enumerate(bundles)
            ]
            for runner in runners:
                opened.callback(runner.close)
            states = [runner.new_state() for runner in runners]
            for name, calls in _calls(bundles[0].model, record):
                both = _medians(runners, states, calls)
                found.append(Latency(record.name, name, *(round(1000 * s, 3) for s in both)))
    return tuple(found)


def _require(bundles: Sequence[Bundle], name: str, target: Target, shown: Path) -> None:
    """Room for both forms of a component."""
    sizes = [
        bundle.manifest.files[bundle.manifest.component(name).weights].nbytes
        * memory.element_bytes(target, bundle.manifest.dtype)
        // STORAGE[bundle.manifest.dtype].itemsize
        for bundle in bundles
    ]
    with TemporaryDirectory() as folder:
        require_space(Path(folder), sum(sizes))
    memory.require(Estimate(sum(sizes), 0, 0, 0), f"timing {name} of {shown}", target)


def _open(bundle: Bundle, name: str, folder: Path, target: Target) -> Runner:
    folder.mkdir()
    backend, context = backends.backend(target), _context(bundle.model)
    record, sizes = bundle.manifest.component(name), shapes.of(name, bundle.model, context)
    dtype = bundle.manifest.dtype
    compiled = backend.compile(bundle.path, dtype, record, folder, target, sizes)
    options = RunnerOptions(context=context)
    return backend.open(folder, compiled.record, bundle.manifest.model, options)


def _context(model: Model) -> int:
    return min(question(model).prompt_tokens + 1, towers.context_of(model))


def _calls(model: Model, record: ComponentRecord) -> Iterator[tuple[str, Calls]]:
    """The calls of a component in one question, by name."""
    work = question(model)
    axes = image_axes(model, work.views, work.image_tokens)
    lm = towers.language_model(model)
    if lm is None or record.name != lm.name:
        encoders = {f"encoder.{encoder.name}" for encoder in model.encoders}
        views = {"tiles": 1} if record.name in encoders else {}
        yield "view", [{port.name: _values(port, {**axes, **views}) for port in record.inputs}]
        return
    length = _context(model) - 1
    chunks = -(-length // PREFILL_CHUNK)
    ends = [round(length * (i + 1) / chunks) for i in range(chunks)]
    axes["rows"] = work.image_tokens
    spans = zip([0, *ends], ends, strict=False)
    yield "prompt", [_tokens(record, axes, start, end, work.image_tokens) for start, end in spans]
    yield "token", [_tokens(record, axes | {"rows": 1}, length, length + 1, 0)]


def _tokens(
    record: ComponentRecord, axes: Mapping[str, int], start: int, end: int, image: int
) -> dict[str, Array]:
    """What the language model reads of a prompt from `start` to `end`: an image, then text."""
    states = {port.updates for port in record.outputs if port.updates}
    plain = [port for port in record.inputs if port.name not in states]
    values = {port.name: _values(port, {**axes, "sequence": end - start}) for port in plain}
    positions = np.arange(start, end)[None]
    given = {
        "rows": np.where(positions < image, positions, -1),
        "start": np.array([start], np.int64),
        "score": np.array([[end - start - 1]], np.int64),
    }
    return {**values, **given}


def _values(port: Port, axes: Mapping[str, int]) -> Array:
    shape = [axes[n] if isinstance(n, str) else n for n in port.shape]
    if port.dtype == "int64":
        return np.zeros(shape, np.int64)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _medians(runners: Sequence[Runner], states: Sequence[State], calls: Calls) -> list[float]:
    """Seconds of all calls, one after the other, by each runner in turn."""
    seconds: list[list[float]] = [[] for _ in runners]
    begun = time.perf_counter()
    for run in range(_MOST + 1):
        for runner, state, own in zip(runners, states, seconds, strict=True):
            start = time.perf_counter()
            for inputs in calls:
                runner.run(inputs, state)
            if run:  # the first one binds buffers
                own.append(time.perf_counter() - start)
        if run >= _LEAST and time.perf_counter() - begun > _SECONDS:
            break
    return [float(np.median(own)) for own in seconds]
