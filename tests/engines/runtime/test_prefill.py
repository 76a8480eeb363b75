"""A long prompt is read in pieces: same tokens whatever the piece, on every backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.backends.state import State
from edgevlm.engines.runtime import session as sessions
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.ops.vocabulary import Array
from tests.conftest import HERE
from tests.pipeline import engine_of

CASE = HERE / "goldens/mlcd_llavanext_e2e"


@pytest.mark.parametrize(
    ("target", "piece"),
    [("cpu", 1), ("cpu", 7), ("cpu", 64), ("cpu", 10_000), ("reference", 30)],
)
def test_the_answer_does_not_depend_on_the_piece(
    target: str,
    piece: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path_factory.getbasetemp() / "prefill"
    work.mkdir(exist_ok=True)
    session = Session.open(engine_of(CASE, work, target=target))
    monkeypatch.setattr(sessions, "PREFILL_CHUNK", piece)
    text = json.loads((CASE / "meta.json").read_text())["prompt_one_image"]
    answer = session.answer(Question(text, [CASE / "image0.png"], 12, template="none"))
    expected = np.load(CASE / "outputs.npz")["one_image.greedy_ids"].tolist()
    assert list(answer.token_ids) == expected[:12]
    session.close()


def test_pieces_are_of_nearly_equal_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    session = Session.open(engine_of(CASE, tmp_path))
    runner, lengths = session._runners["lm"], []
    run = runner.run

    def listening(inputs: dict[str, Array], state: State) -> dict[str, Array]:
        lengths.append(inputs["ids"].shape[1])
        return run(inputs, state)

    monkeypatch.setattr(runner, "run", listening)
    monkeypatch.setattr(sessions, "PREFILL_CHUNK", 10)
    answer = session.answer(Question("What?", [CASE / "image0.png"], 3))
    *prompt, first, second = lengths
    assert sum(prompt) == answer.prompt_tokens
    assert max(prompt) <= 10
    assert max(prompt) - min(prompt) <= 1
    assert (first, second) == (1, 1)
