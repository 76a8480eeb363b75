"""An engine as a model of lmms-eval, where that is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgevlm import Question, Session
from edgevlm.toolkit.errors import ConfigError
from tests.refusals import IMAGE

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; it is no dependency")


def pictures(doc: dict[str, Any]) -> list[Any]:
    from PIL import Image

    return [Image.open(doc["image"])]


@pytest.fixture
def model(ready: Path) -> Any:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from edgevlm.engines.evaluation.lmms import EdgeVLM, manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.resolve("edgevlm").class_path.endswith("lmms.EdgeVLM")
    found = EdgeVLM.create_from_arg_string(f"engine={ready / 'engine-cpu'},threads=1")
    found.task_dict = {"local": {"test": [{"image": str(IMAGE)}]}}
    return found


def request(context: str, given: Any) -> Any:
    return SimpleNamespace(args=(context, given, pictures, 0, "local", "test"))


def test_answers_are_those_of_run(model: Any, ready: Path) -> None:
    given = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    found = model.generate_until([request("What is this?", given)])
    with Session.open(ready / "engine-cpu", threads=1) as session:
        assert found == [session.answer(Question("What is this?", str(IMAGE), 6)).text]


def test_a_continuation_has_the_probability_of_its_tokens(model: Any, ready: Path) -> None:
    with Session.open(ready / "engine-cpu", threads=1) as session:
        question = Question("What is this?", str(IMAGE), 3)
        texts = ["a red dog", session.answer(question).text]
        expected = [by_hand(session, question, text) for text in texts]
    found = model.loglikelihood(
        [request("What is this?", texts[0]), request("What is this?", lambda doc: texts[1])]
    )
    for (total, greedy), (wanted, likeliest) in zip(found, expected, strict=True):
        assert total == pytest.approx(wanted, rel=1e-4)
        assert greedy is likeliest


def by_hand(session: Session, question: Question, text: str) -> tuple[float, bool]:
    """Log probability of a text after a question, and whether every token is the likeliest."""
    sequence, features = session.ask(question).read()
    state, total, likeliest = session.new_state(), 0.0, True
    logits = session.prefill(sequence, features, state).astype(np.float64)
    for number, token in enumerate(session.tokenizer.encode(text, special=False)):
        total += logits[token] - np.log(np.exp(logits).sum())
        likeliest = likeliest and bool(logits.argmax() == token)
        logits = session.decode(token, sequence.length + number, state).astype(np.float64)
    return float(total), likeliest


def test_settings_without_a_meaning_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        model.generate_until([request("?", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="penalty_alpha"):
        model.generate_until([request("?", {"penalty_alpha": 0.6})])
    with pytest.raises(ConfigError, match="pretrained"):
        type(model)("x", pretrained="y")
