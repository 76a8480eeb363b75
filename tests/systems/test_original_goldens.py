"""Tier 3: checkpoints in the original layout reproduce what the original code computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.images import decode, preprocess
from edgevlm.toolkit.ops.numpy_ops import NumpyOps
from edgevlm.toolkit.ops.vocabulary import Array, Weights
from edgevlm.toolkit.text import prompts
from edgevlm.toolkit.vlm import components
from tests.pipeline import ask, engine_of

CASES = ["e2e_llava15", "e2e_convllava", "e2e_mmfuser"]


class Golden:
    """A golden folder of the kind e2e_*: paths, prompts and arrays."""

    def __init__(self, folder: Path) -> None:
        self.case: dict[str, Any] = json.loads((folder / "case.json").read_text())
        self.checkpoint = folder / self.case["checkpoint"]
        self.image = folder / "image.png"
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.outputs = dict(np.load(folder / "outputs.npz"))


def near(found: Array, expected: Array, tolerance: float = 1e-4) -> None:
    """Within `tolerance` of the largest expected value."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=tolerance * scale)


@pytest.fixture(scope="module", params=CASES)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Golden, Path]:
    from tests.conftest import golden_case

    golden = Golden(golden_case(request.param))
    return golden, engine_of(golden.checkpoint, tmp_path_factory.mktemp(request.param))


def test_greedy_tokens_are_the_originals(built: tuple[Golden, Path]) -> None:
    golden, engine = built
    answer = ask(engine, golden.case["prompt"], [golden.image])
    assert list(answer.token_ids) == golden.outputs["greedy_ids"].reshape(-1).tolist()
    assert answer.text.strip() == golden.case["greedy_text"].strip()


def test_the_reference_engine_gives_the_same_tokens(built: tuple[Golden, Path]) -> None:
    golden, engine = built
    slow = engine_of(golden.checkpoint, engine.parent, target="reference")
    answer = ask(slow, golden.case["prompt"], [golden.image])
    assert list(answer.token_ids) == golden.outputs["greedy_ids"].reshape(-1).tolist()


def test_pixels_are_bit_equal(built: tuple[Golden, Path]) -> None:
    golden, engine = built
    session = Session.open(engine)
    (rule,) = session.model.images.encoders.values()
    pixels = preprocess.preprocess(decode.load(golden.image).rgb, rule)
    assert np.array_equal(pixels[None], golden.outputs["pixel_values"])


def test_prompt_ids_are_the_originals(built: tuple[Golden, Path]) -> None:
    golden, engine = built
    session = Session.open(engine)
    for text, ids in (("prompt", "input_ids"), ("prompt_two_images", "input_ids_two_images")):
        prompt = prompts.tokenize(session.model.prompts, session.tokenizer, golden.case[text])
        joined: list[int] = []
        for number, run in enumerate(prompt.runs):
            joined += [-200] * bool(number) + list(run)
        assert joined == golden.inputs[ids].reshape(-1).tolist()


def test_the_default_template_makes_the_originals_prompt(built: tuple[Golden, Path]) -> None:
    golden, engine = built
    rules = Session.open(engine).model.prompts
    question = [golden.case["question"]]
    text = prompts.render(rules, question, 1, golden.case["conv_mode"]).text
    assert text == golden.case["prompt"]
    assert prompts.render(rules, question, 1, "auto").text == text
    assert prompts.render(rules, question, 2, "auto").text == golden.case["prompt_two_images"]


def test_features_and_logits_are_near(built: tuple[Golden, Path]) -> None:
    golden, engine = built
    bundle = Bundle.open(engine.parent / "bundle")
    parts = {p.name: p for p in components.components(bundle.model)}
    session = Session.open(engine)
    found = session.vision.encode([decode.load(golden.image)], _clock())
    features, rows = found.rows, found.indices
    near(features, golden.outputs["projector_output"])
    (encoder,) = [p for n, p in parts.items() if n.startswith("encoder.")]
    outputs = encoder.forward(
        NumpyOps(),
        Weights(bundle.tensors(encoder.name)),
        {"pixels": golden.outputs["pixel_values"]},
    )
    stacked = np.stack(list(outputs.values()))
    near(stacked, golden.outputs["encoder_features"].reshape(stacked.shape))
    sequence = _sequence(session, golden.case["prompt"], rows)
    op, table = NumpyOps(), Weights(bundle.tensors("lm")) / "embed"
    embedded = op.place_tokens(op.embed(sequence.ids, table), features, sequence.rows)
    near(embedded, golden.outputs["inputs_embeds"])
    logits = session.prefill(sequence, features, session.new_state())
    near(logits, golden.outputs["logits"][0, -1])


def test_two_images_in_their_order(built: tuple[Golden, Path], tmp_path: Path) -> None:
    golden, engine = built
    from PIL import Image, ImageOps

    mirrored = tmp_path / "mirrored.png"
    ImageOps.mirror(Image.open(golden.image)).save(mirrored)
    session = Session.open(engine)
    images = [decode.load(golden.image), decode.load(mirrored)]
    features = session.vision.encode(images, _clock())
    sequence = _sequence(session, golden.case["prompt_two_images"], features.indices)
    expected = golden.outputs["logits_two_images_last"].reshape(-1)
    near(session.prefill(sequence, features.rows, session.new_state()), expected)


def _sequence(session: Session, text: str, rows: Sequence[Array]) -> prompts.PromptSequence:
    prompt = prompts.tokenize(session.model.prompts, session.tokenizer, text)
    return prompts.assemble(prompt, rows)


def _clock() -> Any:
    from edgevlm.engines.runtime.clock import Clock

    return Clock()
