"""What a calibration holds at a time does not grow with the layers of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.calibration import calibrate as calibration
from edgevlm.calibration import kept_codes
from edgevlm.calibration.calibrate import calibrate
from edgevlm.calibration.calibrator import Calibrator
from edgevlm.calibration.chain import Chain, in_numpy
from edgevlm.calibration.pictures import Sample
from edgevlm.calibration.rounding import Method
from edgevlm.calibration.samples import Settings
from edgevlm.calibration.static_plan import plan_of
from edgevlm.calibration.unfinished import Unfinished
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.vlm.components import lm_component
from tests.calibration.peaks import peak
from tests.conftest import HERE
from tests.pipeline import silent

IDS = np.random.default_rng(0).integers(0, 40, (6, 64))


def deep(layers: int, folder: Path) -> Source:
    """A language model of so many layers, weights of 0.4 MB in each, mapped from a file."""
    tiny = systems.load(HERE / "goldens/e2e_llava15/llava-v1.5-tiny", Options())
    config = replace(tiny.model.lm.config, num_layers=layers, intermediate_size=1024)
    lm = replace(tiny.model.lm, config=config)
    generator = np.random.default_rng(1)
    weights = {
        key: (0.1 * generator.standard_normal(shape)).astype(np.float32)
        for key, shape in lm_component(lm).shapes.items()
    }
    source = replace(
        tiny, model=replace(tiny.model, lm=lm), weights={**tiny.weights, lm.name: weights}
    )
    api.write_source(source, "deep", folder, dtype="fp32", force=False, progress=silent)
    return systems.load(folder, Options())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Source]]:
    found = {}
    for layers in (2, 6):
        path = tmp_path_factory.mktemp("deep") / str(layers)
        found[layers] = (path, deep(layers, path))
    return found


def test_static_int8(sources: dict[int, tuple[Path, Source]]) -> None:
    peaks = []
    for path, source in sources.values():
        bundle, settings = Bundle.open(path), Settings("int8-static", keep_float=("encoder*", "m*"))
        plan = plan_of(bundle.vlm, settings)
        chain = Chain(bundle.vlm, bundle.tokenizer())
        made = Calibrator(chain, in_numpy(), settings, silent)
        samples = [Sample(ids=ids) for ids in IDS]
        peaks.append(peak(lambda: made.ranges(source.weights, plan, samples)))  # noqa: B023
    histograms = 2048 * 8 * 4 * 4  # of four more layers, four inputs in each
    weights = 4 * (3 * 1024 * 32 + 4 * 32 * 32) * 4
    assert peaks[1] - peaks[0] < histograms + 0.2 * weights


@pytest.mark.parametrize(("method", "aim"), [("awq+gptq", 1.0), ("rtn", -1e12)])
def test_4_bits(
    method: Method,
    aim: float,
    sources: dict[int, tuple[Path, Source]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aim: of one round, and of all of them."""
    monkeypatch.setattr(kept_codes, "_IN_MEMORY", 0)
    monkeypatch.setattr(calibration, "_AIM", aim)
    peaks = []
    for layers, (_, source) in sources.items():
        lm, settings = lm_component(source.model.lm), Settings(budget=1e9, method=method)
        kept = Unfinished(tmp_path / str(layers), "test")
        kept.begin(silent, layers)
        plain = source.weights[lm.name]
        windows = (IDS[:4], IDS[4:])
        peaks.append(peak(lambda: calibrate(lm, plain, windows, settings, silent, kept)))  # noqa: B023
        kept.close(remove=True)
    codes = 4 * (3 * 1024 * 32 + 4 * 32 * 32) * (0.5 + 4 / 32)  # and their scales
    assert peaks[1] - peaks[0] < 0.5 * codes
