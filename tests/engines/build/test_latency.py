"""Components of two bundles, timed beside each other by the calls of one question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api, requantize
from edgevlm.engines.backends import onnxruntime
from edgevlm.engines.build import latency
from edgevlm.engines.runtime import memory
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import OutOfMemory
from tests.pipeline import silent

TEXT = Path(__file__)


@pytest.fixture(scope="module")
def in_int4(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latency") / "int4"
    api.calibrate(ready / "bundle", out, text=TEXT, window=16, windows=6, method="rtn", budget=1e9)
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_SECONDS", 0.0)


def test_every_component_is_timed_before_and_after(
    ready: Path, in_int4: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, plain = list[Path](), onnxruntime.open

    def seen(folder: Path, *given: Any) -> Any:
        opened.append(folder)
        return plain(folder, *given)

    monkeypatch.setattr(onnxruntime, "open", seen)
    found = requantize.latency(ready / "bundle", in_int4, silent)
    assert [(x.component, x.call) for x in found] == [
        ("encoder.clip", "view"),
        ("merger", "view"),
        ("lm", "prompt"),
        ("lm", "token"),
    ]
    assert all(x.before_ms > 0 and x.after_ms > 0 for x in found)
    assert found[0].speedup == found[0].before_ms / found[0].after_ms
    assert len(opened) == 6
    assert not any(folder.exists() for folder in opened)


def test_calls_are_those_of_a_question(ready: Path) -> None:
    bundle = Bundle.open(ready / "bundle")
    record, model = bundle.manifest.component("lm"), bundle.vlm
    calls = dict(latency._calls(model, record))
    rows = np.concatenate([call["rows"] for call in calls["prompt"]], 1)[0]
    images = int((rows >= 0).sum())
    assert rows[:images].tolist() == list(range(images))
    assert len(rows) == min(images + 32, model.lm.config.context - 1)
    assert calls["prompt"][0]["features"].shape == (images, model.lm.config.hidden_size)
    starts = [int(call["start"][0]) for call in calls["prompt"]]
    assert starts[0] == 0
    (token,) = calls["token"]
    assert (int(token["start"][0]), token["ids"].shape) == (len(rows), (1, 1))


def test_without_room_for_both_it_is_refused(
    ready: Path, in_int4: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(OutOfMemory, match=r"timing encoder\.clip"):
        requantize.latency(ready / "bundle", in_int4, silent)
