"""Check an engine's accuracy: that of its kernels, and that of its weights' precision.

Kernels: the engine against the reference on the same, possibly rounded, weights. Precision: the
engine against the reference on the float weights. Both are relative root mean square errors over
all golden calls of a component; logits are compared after subtracting the mean of each row. Golden
calls are random, which is harder on a trained model than text is. On a card, whose builders have
other kernels for it, the last token is also computed for several sequences in one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from edgevlm.engines.backends import Backend, Compiled, Runner, RunnerOptions, native
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import AXES, Golden, relative_rms
from edgevlm.toolkit.bundle.manifest import GOLDENS, Bundle
from edgevlm.toolkit.errors import (
    AccuracyError,
    BuildError,
    BundleError,
    ConfigError,
    ToolkitError,
)
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Precision, PrecisionPlan
from edgevlm.toolkit.vlm import towers

Progress = Callable[[str], None]
# The largest error of kernels that a build accepts, by the precision in which they compute. int8:
# the inputs of products are rounded to 8 bits in blocks, which a trained decoder amplifies, on
# random tokens more than on text: in SmolLM2-135M to 0.15 and 0.05; in encoders it stays near 0.01.
# int8_rows: the reference rounds the inputs too, so a product is right to 1e-6; but values between
# two steps may be rounded to the other one, which deep models amplify as they do any rounding: to
# 0.017 in CLIP-L of a loss of 0.019, with random weights. fp8: the same, of values of E4M3, which
# lie farther apart: a value that falls to the other one is off by a sixteenth.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 1e-1, "int8_rows": 1e-1, "fp8": 1e-1}
DECODER_TOLERANCE = {**TOLERANCE, "int8": 2e-1, "int8_rows": 2e-1, "fp8": 2e-1}
# The largest loss against the float model that a build accepts unless told otherwise, by the
# precision of the plan. Weights in 8 bits lose 0.01 to 0.04 in random models and 0.12 in
# SmolLM2-135M, whose perplexity grows by 0.35 %; in 4 bits, rounded to nearest, 0.3 to 0.5 and
# 0.7: there perplexity grows by 26 % and four tokens of ten differ. Zeroed weights lose 0.7 to 1.
MAX_LOSS: Mapping[Precision, float] = {
    "int8_weights": 0.2,
    "int4_weights": 0.2,
    "int8_rows": 0.2,
    "int8": 0.2,
    "fp8": 0.2,
}
_TOGETHER = 2  # sequences whose last token is computed in one call, on a card
_CENTERED = "logits"  # the outputs that mean the same if a constant is added to a row


@dataclass(frozen=True)
class Errors:
    """Errors by component: of kernels; and of the precision, empty for a float model."""

    kernels: dict[str, float]
    losses: dict[str, float]

    def joined(self, others: Errors, suffix: str) -> Errors:
        """These and others, whose components get `suffix` behind their names."""
        kernels, losses = (
            {**mine, **{name + suffix: error for name, error in theirs.items()}}
            for mine, theirs in ((self.kernels, others.kernels), (self.losses, others.losses))
        )
        return Errors(kernels, losses)


def allowed_loss(plan: PrecisionPlan, accept: float | None) -> float:
    """The largest loss that a build with this plan accepts.

    accept: the value of --accept-loss. Raises ConfigError if it is invalid or has no effect.
    """
    if accept is None:
        return max((MAX_LOSS[precision] for precision in plan.precisions), default=0.0)
    if not (math.isfinite(accept) and accept > 0):
        raise ConfigError(f"--accept-loss {accept} is not a number above 0")
    if not plan.precisions:
        raise ConfigError(
            f"--accept-loss {accept} has no effect: no weight is rounded",
            hint="leave it out, or add --precision",
        )
    return accept


def check(
    bundle: Bundle,
    compiled: list[Compiled],
    backend: Backend,
    folder: Path,
    allowed: float,
    progress: Progress,
    *,
    bisect: bool = False,
) -> Errors:
    """Run the goldens on the compiled components in `folder`.

    Raises AccuracyError naming the first component whose kernels are beyond their tolerance (with
    `bisect`, its first op too) or whose precision costs more than `allowed`.
    """
    all_calls = goldens.load(bundle.path / GOLDENS)
    if bundle.manifest.plan.precisions and not all(golden.float_outputs for golden in all_calls):
        raise BundleError(
            f"{bundle.path} is quantized and lacks the float model's answers",
            hint="quantize the float bundle again",
        )

    def search(component: Compiled, calls: list[Golden], limit: float) -> str:
        return _first_op(bundle, component, backend, folder, calls, limit)

    return compare(
        all_calls,
        bundle.manifest.model,
        min(AXES["context"], towers.context_of(bundle.model)),
        compiled,
        backend,
        folder,
        allowed,
        progress,
        search=search if bisect else None,
    )


def compare(
    all_calls: list[Golden],
    model: Mapping[str, object],
    context: int,
    compiled: list[Compiled],
    backend: Backend,
    folder: Path,
    allowed: float,
    progress: Progress,
    *,
    search: Callable[[Compiled, list[Golden], float], str] | None = None,
) -> Errors:
    """The same for given goldens, of components opened with so many positions of KV cache.

    search: finds the first op of a component that differs, as text.
    """
    errors = Errors({}, {})
    for component in (form for part in compiled for form in native.forms(part, folder)):
        name, limit = component.record.name, tolerance(component)
        progress(f"{name}: comparing with the reference")
        record = component.record
        calls = goldens.calls_of(all_calls, name, record.inputs, record.outputs)
        large = _is_large(component, folder)
        together = _TOGETHER if decodes(component) and backend.here().on_card and not large else 0
        outputs = _outputs(component, calls, together, backend, folder, model, context)
        calls = [*calls, *calls[-1:] * together]
        answers = _answers(calls, outputs)
        error = _error(answers, [golden.outputs for golden in calls])
        if not error <= limit:
            op = search(component, calls, limit) if search else ""
            raise _wrong_kernels(name, error, limit, op, bisect=search is not None)
        errors.kernels[name] = max(error, errors.kernels.get(name, 0.0))
        if all(golden.float_outputs for golden in calls):
            loss = _error(answers, [golden.float_outputs for golden in calls])
            if not loss <= allowed:
                raise _lossy(name, loss, allowed)
            errors.losses[name] = max(loss, errors.losses.get(name, 0.0))
    return errors


def tolerance(component: Compiled) -> float:
    """The largest error that a component's kernels may have."""
    return (DECODER_TOLERANCE if decodes(component) else TOLERANCE)[component.precision]


def decodes(component: Compiled) -> bool:
    """Whether a component has a KV state."""
    return any(port.updates for port in component.record.outputs)


@dataclass(frozen=True)
class _Answer:
    """One output of one call: its shape, and its values where they are compared."""

    shape: tuple[int, ...]
    values: Array


def _answers(
    calls: list[Golden], outputs: Iterable[Mapping[str, Array]]
) -> list[dict[str, _Answer]]:
    return [
        {n: _Answer(found[n].shape, goldens.sampled(found[n])) for n in golden.outputs}
        for golden, found in zip(calls, outputs, strict=True)
    ]


def _outputs(
    component: Compiled,
    calls: list[Golden],
    together: int,
    backend: Backend,
    folder: Path,
    model: Mapping[str, object],
    context: int,
) -> Iterator[Mapping[str, Array]]:
    """What a component answers to each call, valid until the next: opened whole, or in pieces.

    together: behind them come so many answers to the last call, for as many sequences at once.
    Raises BuildError where it cannot be run on them.
    """
    record = component.record
    if _is_large(component, folder):
        from edgevlm.engines.build import pieces

        yield from pieces.answers(folder, record, calls, context)
        return
    options = RunnerOptions(context=context, plugins=component.plugins)
    runner = backend.open(folder, record, model, options)
    try:
        state = runner.new_state()
        for golden in calls:
            yield runner.run(golden.inputs, state)
        if together:
            yield from _side_by_side(runner, component, calls, together)
    except ToolkitError:
        raise
    except Exception as refused:  # backends raise many types of their own
        raise BuildError(
            f"{record.name} cannot be run on its goldens: {refused}",
            hint="the bundle's graph, weights and goldens do not go together; export it again",
        ) from None
    finally:
        runner.close()


def _side_by_side(
    runner: Runner, component: Compiled, calls: list[Golden], count: int
) -> Iterator[Mapping[str, Array]]:
    """What a decoder answers to the last call in one of `count` sequences, each of which is that of
    the goldens.
    """
    *prompt, last = calls
    state = runner.new_state(count)
    for slot in range(count):
        for golden in prompt:
            runner.run(golden.inputs, state.slot(slot))
    rows = {port.name for port in component.record.inputs if port.shape[0] == "batch"}
    repeated = {
        name: np.repeat(value, count, axis=0) if name in rows else value
        for name, value in last.inputs.items()
    }
    found = runner.run(repeated, state)
    for row in range(count):
        yield {name: values[row : row + 1] for name, values in found.items()}


def _is_large(component: Compiled, folder: Path) -> bool:
    """Whether a component's weights are too many to be held, and its graph can be cut in pieces:
    ONNX Runtime runs it on the processor.
    """
    record = component.record
    if not component.searchable or component.plan or record.graph not in component.files:
        return False
    return (folder / record.weights).stat().st_size > memory.WHOLE_BYTES


def _error(answers: list[dict[str, _Answer]], expected: Iterable[Mapping[str, Array]]) -> float:
    """The relative rms error of the worst output, over all calls."""
    by_output: dict[str, list[tuple[Array, Array]]] = {}
    for answer, outputs in zip(answers, expected, strict=True):
        for name, values in outputs.items():
            by_output.setdefault(name, []).append(_comparable(name, answer[name], values))
    return max(relative_rms(pairs) for pairs in by_output.values())


def _comparable(name: str, answer: _Answer, expected: Array) -> tuple[Array, Array]:
    if name != _CENTERED or answer.values.shape != expected.shape:
        return answer.values, expected
    return goldens.centered(answer.values, answer.shape), goldens.centered(expected, answer.shape)


def _wrong_kernels(
    name: str, error: float, limit: float, op: str, *, bisect: bool
) -> AccuracyError:
    return AccuracyError(
        f"{name} differs from the reference by {error:.3g} (relative rms), allowed {limit}{op}",
        hint="nothing was written; please report this with the output of edgevlm doctor"
        if bisect
        else "add --bisect to find the first op that differs",
    )


def _lossy(name: str, loss: float, allowed: float) -> AccuracyError:
    if not math.isfinite(loss):
        return AccuracyError(f"{name} in this precision gives values that are no numbers")
    accept = math.ceil(loss * 100) / 100
    return AccuracyError(
        f"{name} in this precision differs from the float model by {loss:.3g} (relative rms), "
        f"allowed {allowed:g}",
        hint=f"take a higher precision (--precision int8), or accept it: --accept-loss {accept:g}",
    )


def _first_op(
    bundle: Bundle,
    component: Compiled,
    backend: Backend,
    folder: Path,
    calls: list[Golden],
    limit: float,
) -> str:
    """Where the compiled graph first diverges, as the last words of an error message."""
    if component.record.graph not in component.files or not component.searchable:
        return "; this backend has no graph to search"
    from edgevlm.engines.build import bisect, bisect_plans

    if component.plan is not None:
        record = bundle.manifest.component(component.record.name)
        marking = cast(bisect_plans.Marking, backend)
        divergence = bisect_plans.first_divergence(
            bundle, record, marking, calls, limit, component.plugins
        )
        if divergence is None:
            return "; no tensor differs once it is an output, so what the builder fuses does"
    else:
        where = bundle, component.record, folder, calls, limit
        divergence = bisect.first_divergence(*where, component.provider)
    if divergence is None:
        return "; no tensor that both graphs name differs, so the portable graph itself does"
    return f"; first at {divergence.tensor}, made by {divergence.op}: {divergence.difference:.3g}"
