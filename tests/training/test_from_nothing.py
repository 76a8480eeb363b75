"""Small models of four systems are trained, exported and built; engines answer as torch does."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import greedy, questions, small_systems
from benchmarks.questions import Pictures
from benchmarks.small_systems import Sizes
from edgevlm import api
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.vlm.components import components
from edgevlm.training import initial

SMALL = Sizes(
    side=16,
    width=32,
    heads=2,
    layers=5,
    pair_layers=2,
    depths=(1, 1, 1, 1, 1),
    dims=(8, 16, 16, 32, 32),
    stem=1,
    lm_width=32,
    lm_layers=1,
)
NAMES = ("red", "green", "blue")
STEPS = 40


def coloured(count: int, seed: int) -> Pictures:
    """Noise in which one of the colours is stronger."""
    draw = np.random.default_rng(seed)
    files, labels = [], draw.integers(0, len(NAMES), count)
    for label in labels:
        pixels = draw.integers(0, 120, (16, 16, 3), np.uint8)
        pixels[..., label] += 130
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG")
        files.append(out.getvalue())
    return Pictures(tuple(files), tuple(labels.tolist()), NAMES)


@pytest.mark.parametrize("system", small_systems.SYSTEMS)
def test_an_engine_answers_what_the_trained_model_answers(system: str, tmp_path: Path) -> None:
    data = questions.write(tmp_path / "data", coloured(48, seed=1), "red")
    small_systems.write(tmp_path / "new", system, SMALL, questions.texts(NAMES, "red"))
    result = api.train(
        "all",
        str(tmp_path / "new"),
        tmp_path / "trained",
        data=[str(data)],
        steps=STEPS,
        batch=16,
        micro_batch=16,
        rate=5e-3,
        log_every=5,
    )
    assert result.trained_parameters == result.parameters
    assert result.first_loss is not None and result.last_loss is not None
    assert result.last_loss < result.first_loss / 2
    asked = questions.of(coloured(8, seed=2), "red")
    source = systems.load(tmp_path / "trained", Options())
    expected = greedy.answers(source, [one.asked for one in asked])
    eos = api.export_bundle(tmp_path / "trained", tmp_path / "bundle").vlm.prompts.eos
    api.build_engine(tmp_path / "bundle", tmp_path / "engine")
    with Session.open(tmp_path / "engine") as session:
        for one, ids in zip(asked, expected, strict=True):
            question = Question(one.asked.question, [one.asked.picture], max_tokens=8)
            found = session.answer(question).token_ids
            assert tuple(token for token in found if token not in eos) == ids


def test_pictures_of_a_batch_do_not_change_one_another_s_answers(tmp_path: Path) -> None:
    small_systems.write(tmp_path / "new", "mlcd", SMALL, questions.texts(NAMES, "red"))
    source = systems.load(tmp_path / "new", Options())
    asked = [one.asked for one in questions.of(coloured(3, seed=2), "red")]
    together = greedy.answers(source, asked)
    assert together == [greedy.answers(source, [one])[0] for one in asked]


@pytest.mark.parametrize("system", small_systems.SYSTEMS)
def test_every_initial_value_follows_from_the_seed(system: str) -> None:
    model = small_systems.model(system, SMALL)
    first, again, other = (initial.whole(model, seed) for seed in (0, 0, 1))
    differing = 0
    for part in components(model):
        for key, shape in part.shapes.items():
            tensor = first[part.name][key]
            assert tensor.shape == shape
            assert tensor.dtype == np.float32
            assert np.isfinite(tensor).all()
            assert np.array_equal(tensor, again[part.name][key])
            differing += not np.array_equal(tensor, other[part.name][key])
            if "norm" in key:
                assert (tensor == (1 if key.endswith("weight") else 0)).all()
    assert differing > len(first)


def test_single_tokens_and_positions_are_small_and_layer_scales_one() -> None:
    parts = initial.whole(small_systems.model("comm", SMALL), 0)
    assert 0.01 < float(np.std(parts["lm"]["embed.weight"])) < 0.03
    assert 0.01 < float(np.std(parts["encoder.clip"]["position"])) < 0.03
    assert (parts["encoder.dinov2"]["layers.0.scale1"] == 1).all()
    assert torch.from_numpy(parts["merger"]["clip.scale"]).softmax(-1).std() == 0
