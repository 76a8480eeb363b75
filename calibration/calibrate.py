"""From text to codes: a language model's layers in 4 bits, the worst of them in 8; the price."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from edgevlm.calibration import greedy, rounding, smooth, static, unsampled, weight_only
from edgevlm.calibration.greedy import Agreement
from edgevlm.calibration.kept_codes import Made
from edgevlm.calibration.many import Many, ManyOps, hidden
from edgevlm.calibration.pictures import Given
from edgevlm.calibration.quality import Quality, compare
from edgevlm.calibration.rounding import Rounded
from edgevlm.calibration.samples import (
    STATICS,
    Settings,
    block_of,
    budget_of,
    check,
    windows_of,
)
from edgevlm.calibration.static import Interpreter, StaticCalibration
from edgevlm.calibration.towers import calibrate as towers
from edgevlm.calibration.towers.calibrate import TowerCalibration
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.atomic import refuse_existing, refuse_source
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import AnySource, Options
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization import blockwise
from edgevlm.toolkit.quantization.blockwise import LINEAR, TABLE, StorageFormat
from edgevlm.toolkit.quantization.coded import Coded, Codes
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule
from edgevlm.toolkit.vlm.components import Component, lm_component
from edgevlm.toolkit.vlm.towers import TowerConfig

Progress = Callable[[str], None]
Makers = Mapping[str, Callable[[], Codes]]
MOST_IN_8_BITS = 0.3  # of the linears' weights, to keep within the budget
_AIM = 0.8  # of the budget: the text that chooses the mix favours it, other text costs more
_STEPS = 2  # from none to that many, as in each everything is rounded again


@dataclass(frozen=True)
class Layer:
    """A linear: its bits, and the squared error of its outputs over their size that it has in 4
    bits by its own rounding, where all linears have 4 bits.
    """

    path: str
    bits: int
    error_4_bits: float


@dataclass(frozen=True)
class Calibration:
    """What came out: the plan, the codes of the language model, and what they cost.

    answers: of prompts from held-out text. weights: the language model's, in the form of which the
    codes are. dtype: of what the bundle has in float.
    """

    plan: PrecisionPlan
    codes: Mapping[str, Codes]
    layers: tuple[Layer, ...]
    share_4_bits: float
    quality: Quality
    answers: Agreement
    within_budget: bool
    weights: Mapping[str, Array]
    dtype: str = "fp32"


Result = Calibration | StaticCalibration | TowerCalibration


def of_bundle(
    path: Path,
    out: Path,
    given: Given,
    settings: Settings,
    interpreter: Interpreter | None,
    progress: Progress,
    force: bool,
    kept: Unfinished,
) -> tuple[AnySource, Result]:
    """A float bundle's model with calibrated weights, to be written to `out`.

    interpreter: for static INT8, FP8 and towers; None for NumPy's. kept: what an earlier run found.
    Raises ToolkitError before any work where that cannot be.
    """
    if isinstance(Bundle.open(path).model, TowerConfig):
        given_to = (path, out, given, settings, interpreter, progress, force, kept)
        return towers.of_bundle(*given_to)
    check(settings)
    if settings.to in STATICS:
        return static.of_bundle(path, out, given, settings, interpreter, progress, force, kept)
    if given.text is None or given.images or given.prompts:
        raise ConfigError(
            f"--to {settings.to} is calibrated with text alone",
            hint="give --text FILE; for images and prompts there is --to int8-static",
        )
    bundle = Bundle.open(path)
    bundle.verify()
    chosen = windows_of(bundle, given.text, settings)
    refuse_source(out, path)
    refuse_existing(out, force=force)
    source = systems.load(path, Options())
    lm = lm_component(source.model.lm)
    plain = source.weights[lm.name]
    kept.begin(progress, bundle.sha256, settings, *(_sha256(ids) for ids in chosen))
    found = calibrate(lm, plain, chosen, settings, progress, kept)
    plan = weight_only.with_vision(found.plan, source.model)
    weights = {**source.weights, lm.name: Coded(found.weights, found.codes)}
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
    kept = {key: partial(_nearest, weights, key, s) for key, s in _ends(lm).items()}
    if settings.to == "int8":
        return _in_8_bits(lm, weights, linears, kept, held, settings, progress)
    fit = _until_it_fits(lm, weights, kept, windows, settings, progress, unfinished or Unfinished())
    found, in_8 = fit.rounded(), set(fit.in_8)
    codes = _with_ends(found, kept)
    block, zero_points = block_of(settings), settings.zero_points
    without = [
        Rule(_path(key, lm), "int4_weights", block)
        for key in linears
        if zero_points and key not in in_8 and not codes[key].storage.zero_points
    ]
    plan = PrecisionPlan(
        "int8_weights",
        (
            Rule(f"{lm.name}/layers.*", "int4_weights", block, zero_points),
            *without,
            *(Rule(_path(key, lm), "int8_weights") for key in linears if key in in_8),
        ),
        method=settings.method,
        samples=len(calibrating),
        samples_sha256=_sha256(calibrating),
    )
    layers = tuple(Layer(_path(k, lm), 8 if k in in_8 else 4, fit.errors[k]) for k in linears)
    share = 1 - sum(_size(lm, k) for k in in_8) / sum(_size(lm, k) for k in linears)
    within = fit.quality.growth <= budget_of(settings)
    scaled = _scaled(lm, weights, found, linears)
    said = _answers(lm, weights, Coded(scaled, codes), windows[1], progress)
    return Calibration(plan, codes, layers, share, fit.quality, said, within, scaled)


def _answers(
    lm: Component,
    plain: Mapping[str, Array],
    rounded: Mapping[str, Array],
    held: Array,
    progress: Progress,
) -> Agreement:
    """Whether answers to prompts from held-out text are the float model's."""
    found = greedy.compare(lm, plain, rounded, greedy.prompts_of(held))
    progress(found.text)
    return found


def _in_8_bits(
    lm: Component,
    weights: Mapping[str, Array],
    linears: Sequence[str],
    kept: Makers,
    held: Array,
    settings: Settings,
    progress: Progress,
) -> Calibration:
    """All linears rounded to nearest."""
    in_8 = {key: partial(_nearest, weights, key, LINEAR[8]) for key in linears}
    codes = Made({**kept, **in_8})
    found = compare(lm, weights, Coded(weights, codes), held, progress)
    plan = weight_only.plan("int8", "--to")
    layers = tuple(Layer(_path(key, lm), 8, 0.0) for key in linears)
    within = found.growth <= budget_of(settings)
    said = _answers(lm, weights, Coded(weights, codes), held, progress)
    return Calibration(plan, codes, layers, 0.0, found, said, within, weights)


@dataclass(frozen=True)
class _Fit:
    """The linears that are kept in 8 bits, what came of rounding, and how good the model is.

    rounded: gives what came of it, from `part` if an earlier run found it. errors: of each linear
    in 4 bits, by key.
    """

    in_8: tuple[str, ...]
    rounded: Callable[[], Rounded]
    part: Unfinished
    quality: Quality
    errors: Mapping[str, float]


def _until_it_fits(
    lm: Component,
    weights: Mapping[str, Array],
    kept: Makers,
    windows: tuple[Array, Array],
    settings: Settings,
    progress: Progress,
    unfinished: Unfinished,
) -> _Fit:
    """Round everything to 4 bits, then the linears with the largest errors to 8, until the budget
    holds: each time anew, as every linear makes up for those before it.
    """
    rounds = _Rounds(lm, weights, kept, windows, settings, progress, unfinished)
    in_4 = [key for key in lm.shapes if _is_layer(key, lm)]
    sizes = {key: _size(lm, key) for key in in_4}
    total, best = sum(sizes.values()), None
    errors: Mapping[str, float] = {}
    for step in range(_STEPS + 1):
        worst = sorted(in_4, key=lambda key: -errors.get(key, 0))
        found = rounds.run(
            step, weight_only.up_to(worst, sizes, MOST_IN_8_BITS * step / _STEPS * total)
        )
        errors = errors or found.errors
        if best is None or found.quality.growth < best.quality.growth:
            best, found = found, best
        if found is not None:  # codes take room on disk: those of the best round stay
            found.part.drop()
        if best.quality.growth <= _AIM * budget_of(settings):
            break
    assert best is not None
    return replace(best, errors=errors)


@dataclass
class _Rounds:
    """Everything is rounded and measured, each time with other linears in 8 bits."""

    lm: Component
    weights: Mapping[str, Array]
    kept: Makers
    windows: tuple[Array, Array]
    settings: Settings
    progress: Progress
    unfinished: Unfinished
    _known: Many | None = None  # what the float model gives for held-out text

    def run(self, step: int, in_8: tuple[str, ...]) -> _Fit:
        """What comes of it; an earlier run's round is not run again."""
        lm, settings, progress = self.lm, self.settings, self.progress
        storage = StorageFormat(4, True, LINEAR[4].suffix, settings.block, settings.zero_points)
        in_4 = {
            k: weight_only.fitting(storage, shape[0])
            for k, shape in lm.shapes.items()
            if _is_layer(k, lm)
        }
        storages = in_4 | dict.fromkeys(in_8, LINEAR[8])
        weights, part = Coded(self.weights, Made(self.kept)), self.unfinished.part(f"round {step}")
        given = (lm, weights, self.windows[0], storages, settings.method, progress, part)
        rounded = partial(rounding.rounded, *given)
        name = f"measured {step}"
        if self.unfinished.has(name):
            arrays = self.unfinished.get(name)
            tokens, *rest = (float(x) for x in arrays["quality"])
            errors = dict(zip(in_4, map(float, arrays["errors"]), strict=True))
            return _Fit(in_8, rounded, part, Quality(int(tokens), *rest), errors)
        progress(f"{len(in_8)} of {len(in_4)} linears in 8 bits")
        found = rounded()
        quality = self._measured(found)
        errors = {key: found.errors[key] for key in in_4}
        arrays = {"quality": np.array(astuple(quality)), "errors": np.array([*errors.values()])}
        self.unfinished.put(name, arrays)
        return _Fit(in_8, lambda: found, part, quality, errors)

    def _measured(self, found: Rounded) -> Quality:
        (_, held), plain = self.windows, self.weights
        self._known = self._known or hidden(self.lm, ManyOps(), plain, held)
        scaled = _scaled(self.lm, plain, found, found.codes.keys())
        made = Coded(scaled, _with_ends(found, self.kept))
        return compare(self.lm, plain, made, held, self.progress, self._known)


def _with_ends(found: Rounded, kept: Makers) -> Made:
    """All codes of the language model, each made or read when it is used."""
    return Made({**{k: partial(found.codes.__getitem__, k) for k in found.codes}, **kept})


def _scaled(
    lm: Component, weights: Mapping[str, Array], found: Rounded, linears: Collection[str]
) -> Mapping[str, Array]:
    """The weights, with the scales that were found moved into what is in front of linears."""
    linked = [x for x in rounding.links(lm, linears) if x.source in found.scales]
    return smooth.smoothed(weights, found.scales, linked) if linked else weights


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
