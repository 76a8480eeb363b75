"""From text to codes: the language model's layers in 4 bits, the worst of them in 8, and its price.

Linears are rounded in the order in which they run, each with the inputs that the layers before it
give once they are rounded, so a layer makes up for errors before it as well as for its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.calibration import gptq, static, unsampled, weight_only
from edgevlm.calibration.kept_codes import KeptCodes, KeptLayers, Made
from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.calibration.pictures import Given
from edgevlm.calibration.quality import Quality, compare
from edgevlm.calibration.samples import BLOCKS, STATIC, Settings, budget_of, check, windows_of
from edgevlm.calibration.static import Interpreter, StaticCalibration
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.atomic import refuse_existing, refuse_source
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import LINEAR, TABLE, StorageFormat
from edgevlm.toolkit.quantization.coded import Coded, Codes
from edgevlm.toolkit.quantization.plan import Block, PrecisionPlan, Rule
from edgevlm.toolkit.vlm.components import Component, lm_component

Progress = Callable[[str], None]
Makers = Mapping[str, Callable[[], Codes]]
MOST_IN_8_BITS = 0.3  # of the linears' weights, to keep within the budget
_AIM = 0.8  # of the budget: the text that chooses the mix favours it, other text costs more
_STEPS = 3  # from none to that many, as each takes a measurement


@dataclass(frozen=True)
class Layer:
    """A linear: its bits, and the squared error of its outputs in 4 bits over their size."""

    path: str
    bits: int
    error_4_bits: float


@dataclass(frozen=True)
class Calibration:
    """What came out: the plan, the codes of the language model, and what they cost.

    dtype: of what the bundle has in float.
    """

    plan: PrecisionPlan
    codes: Mapping[str, Codes]
    layers: tuple[Layer, ...]
    share_4_bits: float
    quality: Quality
    within_budget: bool
    dtype: str = "fp32"


def of_bundle(
    path: Path,
    out: Path,
    given: Given,
    settings: Settings,
    interpreter: Interpreter | None,
    progress: Progress,
    force: bool,
    kept: Unfinished,
) -> tuple[Source, Calibration | StaticCalibration]:
    """A float bundle's model with calibrated weights, to be written to `out`.

    interpreter: for static INT8; None for NumPy's. kept: what an earlier run found. Raises
    ToolkitError before any work where that cannot be.
    """
    check(settings)
    if settings.to == STATIC:
        return static.of_bundle(path, out, given, settings, interpreter, progress, force, kept)
    if given.text is None or given.images or given.prompts:
        raise ConfigError(
            f"--to {settings.to} is calibrated with text alone", hint="give --text FILE, no images"
        )
    bundle = Bundle.open(path)
    bundle.check_sizes()
    chosen = windows_of(bundle, given.text, settings)
    refuse_source(out, path)
    refuse_existing(out, force=force)
    source = systems.load(path, Options())
    lm = lm_component(source.model.lm)
    plain = source.weights[lm.name]
    kept.begin(progress, bundle.sha256, settings, *(_sha256(ids) for ids in chosen))
    found = calibrate(lm, plain, chosen, settings, progress, kept)
    plan = weight_only.with_vision(found.plan, source.model)
    weights = {**source.weights, lm.name: Coded(plain, found.codes)}
    made = unsampled.smoothed(replace(source, plan=plan, weights=weights))
    return made, replace(found, plan=plan)


def calibrate(
    lm: Component,
    weights: Mapping[str, Array],
    windows: tuple[Array, Array],
    settings: Settings,
    progress: Progress,
    unfinished: Unfinished | None = None,
) -> Calibration:
    """Codes for the language model's weights; `windows` as samples.windows_of gives them.

    unfinished: where what was found is kept, and what an earlier run found.
    Raises CalibrationError naming a layer whose inputs say nothing.
    """
    calibrating, held = windows
    linears = [k for k in lm.shapes if _is_layer(k, lm)]
    unfinished = unfinished or Unfinished()
    codes = {key: partial(_nearest, weights, key, LINEAR[8]) for key in linears}
    kept = {key: partial(_nearest, weights, key, s) for key, s in _ends(lm).items()}
    if settings.to == "int8":
        made = Made({**codes, **kept})
        found = compare(lm, weights, Coded(weights, made), held, progress)
        plan = weight_only.plan("int8", "--to")
        layers = tuple(Layer(_path(key, lm), 8, 0.0) for key in linears)
        within = found.growth <= budget_of(settings)
        return Calibration(plan, made, layers, 0.0, found, within)
    zero_points = settings.zero_points
    storage = StorageFormat(4, True, LINEAR[4].suffix, settings.block, zero_points)
    ops = Compensate(storage, linears, progress, unfinished)
    ops.run(lm, Coded(weights, Made(kept)), calibrating)
    in_4 = {key: partial(ops.codes.__getitem__, key) for key in linears}
    choices, errors = (codes, in_4, kept), ops.errors
    in_8 = _until_it_fits(lm, weights, choices, errors, held, settings, progress, unfinished)
    chosen = Made({**in_4, **{key: codes[key] for key in in_8.keys}, **kept})
    rules = [Rule(_path(key, lm), "int8_weights") for key in in_8.keys]
    block = _block(settings.block)
    without = [
        Rule(_path(key, lm), "int4_weights", block)
        for key in linears
        if zero_points and not ops.codes[key].storage.zero_points
    ]
    plan = PrecisionPlan(
        "int8_weights",
        (Rule(f"{lm.name}/layers.*", "int4_weights", block, zero_points), *without, *rules),
        method="gptq",
        samples=len(calibrating),
        samples_sha256=_sha256(calibrating),
    )
    layers = tuple(Layer(_path(k, lm), chosen[k].storage.bits, errors[k]) for k in linears)
    share = 1 - sum(_size(lm, k) for k in in_8.keys) / sum(_size(lm, k) for k in linears)
    within = in_8.quality.growth <= budget_of(settings)
    return Calibration(plan, chosen, layers, share, in_8.quality, within)


@dataclass(frozen=True)
class _Fit:
    """The linears that are kept in 8 bits, and how good the model is with them."""

    keys: tuple[str, ...]
    quality: Quality


def _until_it_fits(
    lm: Component,
    weights: Mapping[str, Array],
    codes: tuple[Makers, Makers, Makers],
    errors: Mapping[str, float],
    held: Array,
    settings: Settings,
    progress: Progress,
    unfinished: Unfinished,
) -> _Fit:
    """Put the linears with the largest errors into 8 bits, until the budget holds."""
    in_8, in_4, kept = codes
    worst = sorted(errors, key=lambda key: -errors[key])
    total, best, known = sum(_size(lm, key) for key in worst), None, None
    for step in range(_STEPS + 1):
        keys = _up_to(worst, lm, MOST_IN_8_BITS * step / _STEPS * total)
        mixed = {**in_4, **{key: in_8[key] for key in keys}, **kept}
        quality = _earlier(unfinished, len(keys))
        if quality is None:
            progress(f"{len(keys)} of {len(worst)} linears in 8 bits: measuring on held-out text")
            known = known or hidden(lm, ManyOps(), weights, held)
            quality = compare(lm, weights, Coded(weights, Made(mixed)), held, progress, known)
            unfinished.put(f"{len(keys)} in 8 bits", {"quality": np.array(astuple(quality))})
        found = _Fit(keys, quality)
        if best is None or found.quality.growth < best.quality.growth:
            best = found
        if best.quality.growth <= _AIM * budget_of(settings):
            break
    assert best is not None
    return best


def _earlier(unfinished: Unfinished, in_8: int) -> Quality | None:
    """What an earlier run measured with so many linears in 8 bits."""
    if not unfinished.has(f"{in_8} in 8 bits"):
        return None
    tokens, *rest = (float(x) for x in unfinished.get(f"{in_8} in 8 bits")["quality"])
    return Quality(int(tokens), *rest)


def _up_to(worst: list[str], lm: Component, most: float) -> tuple[str, ...]:
    """The first of `worst` that have at most so many weights together."""
    taken, size = list[str](), 0
    for key in worst:
        if size + _size(lm, key) > most:
            continue
        taken.append(key)
        size += _size(lm, key)
    return tuple(taken)


@dataclass
class Compensate(ManyOps):
    """Runs the samples, and rounds each linear of a layer as soon as they reach it."""

    storage: StorageFormat
    linears: Collection[str]
    progress: Progress
    unfinished: Unfinished = field(default_factory=Unfinished)
    errors: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.codes = KeptCodes(self.unfinished)
        self._layers = KeptLayers(self.unfinished)
        self._seen: tuple[Many | None, Array] = (None, np.zeros(0))

    def run(self, lm: Component, weights: Mapping[str, Array], windows: Array) -> None:
        """Fill `codes` and `errors`, by key."""
        hidden(lm, self, weights, windows)
        self.errors.update({key: self.codes.error(key) for key in self.linears})

    def block(self, function: Callable[..., Any], w: Weights[Any], *args: Any) -> Any:
        """A layer: from the second argument, which goes through all of them, to the next, and its
        part of the KV cache, which nobody reads.
        """
        passed = self._layers.passed(args[0])
        if passed is not None:
            return passed, (None, None)
        found = super().block(function, w, *args)
        self._layers.leaves(found[0])
        return found

    def linear(self, x: Many, w: Weights[Any]) -> Many:
        key = w.key("weight")
        if key not in self.linears:
            return super().linear(x, w)
        if key in self.codes:
            return super().linear(x, w.replacing(weight=self.codes[key].floats()))
        matrix = w["weight"]
        if self._seen[0] is not x:  # q, k and v have the same input
            self._seen = (x, gptq.second_moments(list(x), w.path))
        found = gptq.compensated(matrix, self._seen[1], fitting(self.storage, len(matrix)), w.path)
        self.codes.add(key, found.codes, found.error)
        number = list(self.linears).index(key) + 1
        self.progress(f"{w.path} ({number} of {len(self.linears)}): error {found.error:.2g}")
        return super().linear(x, w.replacing(weight=found.codes.floats()))


def fitting(storage: StorageFormat, inputs: int) -> StorageFormat:
    """The storage for a weight of so many inputs: without zero points if they cannot be packed."""
    return storage if storage.block_in(inputs) else replace(storage, zero_points=False)


def _is_layer(key: str, lm: Component) -> bool:
    shape = lm.shapes[key]
    return (
        key.startswith("layers.") and len(shape) == 2 and blockwise.block_of(shape[0]) is not None
    )


def _ends(lm: Component) -> dict[str, StorageFormat]:
    """The embedding table and the output layer, which stay in 8 bits."""
    ends = {"embed.weight": (TABLE, 1), "head.weight": (LINEAR[8], 0)}
    return {
        key: storage
        for key, (storage, axis) in ends.items()
        if key in lm.shapes and blockwise.block_of(lm.shapes[key][axis]) is not None
    }


def _nearest(weights: Mapping[str, Array], key: str, storage: StorageFormat) -> Codes:
    matrix = weights[key]
    rows = matrix.T if storage.transposed else matrix
    return Codes(storage, *blockwise.quantize(rows, storage.bits))


def _path(key: str, lm: Component) -> str:
    """As plans name it: "layers.0.mlp.up.weight" is lm/layers.0/mlp/up."""
    layers, number, *modules = key.removesuffix(".weight").split(".")
    return "/".join((lm.name, f"{layers}.{number}", *modules))


def _sha256(ids: Array) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _size(lm: Component, key: str) -> int:
    return math.prod(lm.shapes[key])


def _block(size: int) -> Block:
    return next(block for block in BLOCKS if block == size)
