"""build --precision int8, int4: number formats chosen by time, and one of their own for prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.calibration import weight_only
from edgevlm.engines import manifest
from edgevlm.engines.backends import LayerTime
from edgevlm.engines.backends.state import State
from edgevlm.engines.build import tune
from edgevlm.engines.build.timings import Product, Timings
from edgevlm.engines.build.tune import Choice
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.runtime.two_forms import TwoForms
from edgevlm.export import probe, write
from edgevlm.toolkit import systems
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.quantization.plan import Precision
from edgevlm.toolkit.target import parse, this_cpu
from edgevlm.toolkit.text.prompts import PromptSequence
from edgevlm.toolkit.vlm import components
from tests.conftest import HERE
from tests.pipeline import LOSS_IN_4_BITS, ask, engine_of, silent

GOLDEN = HERE / "goldens/e2e_llava15"
FAST_ROWS: Mapping[Precision, float] = {
    "float": 4,
    "int8_rows": 1,
    "int8_weights": 2,
    "int4_weights": 2,
}


class Prescribed(Timings):
    """Times by precision and rows alone: `slow` for several rows, `single` for one."""

    def __init__(
        self, several: Mapping[Precision, float], single: Mapping[Precision, float]
    ) -> None:
        self.several, self.single, self.saved = several, single, False

    def ms(self, product: Product, precisions: Sequence[Precision]) -> dict[Precision, float]:
        times = self.single if product.rows == 1 else self.several
        return {p: times[p] for p in precisions}

    def save(self) -> None:
        self.saved = True


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("tuned")
    engine_of(GOLDEN / "llava-v1.5-tiny", work)
    return work / "bundle"


def choose(bundle: Path, kind: str, timings: Prescribed, *, keep_slower: bool = False) -> Choice:
    model = Bundle.open(bundle).model
    return tune.tuned(model, kind, timings, silent, keep_slower=keep_slower)


def test_each_part_gets_what_is_fastest(bundle: Path) -> None:
    found = choose(bundle, "int8", timings := Prescribed(FAST_ROWS, FAST_ROWS))
    assert set(found.forms.values()) == {"int8_rows"}
    assert (found.prompts, found.notes, timings.saved) == (None, (), True)
    assert {t.precision for t in found.trials if t.chosen} == {"int8_rows"}
    assert {(t.component, t.call) for t in found.trials} == {
        ("encoder.clip", "view"), ("merger", "view"), ("lm", "prompt"), ("lm", "token"),
    }  # fmt: skip


def test_prompts_get_a_form_of_their_own_where_it_pays(bundle: Path) -> None:
    small: Mapping[Precision, float] = {p: ms / 50 for p, ms in FAST_ROWS.items()}
    found = choose(bundle, "int4", Prescribed(FAST_ROWS, small))
    assert (found.forms["lm"], found.prompts) == ("int4_weights", "int8_rows")
    assert "prompts in int8_rows" in " ".join(found.notes)
    # the tokens of the answer outweigh its prompt: a tenth is not saved any more
    slow_tokens: Mapping[Precision, float] = {p: 4 * ms for p, ms in FAST_ROWS.items()}
    found = choose(bundle, "int4", Prescribed(FAST_ROWS, slow_tokens))
    assert (found.forms["lm"], found.prompts) == ("int4_weights", None)


def test_what_is_slower_than_float_stays_in_float_unless_asked(bundle: Path) -> None:
    slower: Mapping[Precision, float] = {**FAST_ROWS, "float": 0.5}
    found = choose(bundle, "int8", Prescribed(slower, slower))
    assert set(found.forms.values()) == {"float"}
    assert len(found.notes) == 3
    assert all("2.0 times" in note and "--keep-slower" in note for note in found.notes)
    kept = choose(bundle, "int8", Prescribed(slower, slower), keep_slower=True)
    assert set(kept.forms.values()) == {"int8_rows"}


def test_the_output_layer_is_not_counted(bundle: Path) -> None:
    lm = next(c for c in components.components(Bundle.open(bundle).model) if c.name == "lm")
    axes = {"batch": 1, "rows": 1, "scored": 1, "sequence": 5, "context": 8}
    products = tune.products_of(lm, axes)
    linears = [k for k in lm.shapes if k.startswith("layers.") and len(lm.shapes[k]) == 2]
    assert sum(products.values()) == len(linears)
    assert {(p.inputs, p.outputs) for p in products} == {lm.shapes[k] for k in linears}
    assert {p.rows for p in products} == {5, 1}  # behind the last attention only what is scored


def test_times_are_measured_once_on_a_machine(tmp_path: Path) -> None:
    made = []

    def counting(folder: Path, *sizes: Any) -> Any:
        made.append(sizes)
        return probe.linears(folder, *sizes)

    file, product = tmp_path / "cache/timings.json", Product(64, 32, 3)
    timings = Timings(this_cpu(), counting, file)
    found = timings.ms(product, ("float", "int8_rows", "int8_weights", "int4_weights"))
    assert len(made) == 4
    assert all(0 < ms < 1000 for ms in found.values())
    timings.save()
    again = Timings(this_cpu(), counting, file)
    assert again.ms(product, ("float", "int8_rows")) == {
        p: found[p] for p in ("float", "int8_rows")
    }
    assert len(made) == 4
    again.ms(Product(64, 32, 4), ("float",))
    assert len(made) == 5
    file.write_text("[1")  # damaged: as if there were none
    assert Timings(this_cpu(), counting, file).ms(product, ("float",))["float"] > 0
    assert len(made) == 6


@pytest.fixture
def two(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine whose prompts run in int8_rows and whose tokens in int4_weights."""
    forms: dict[str, Precision] = {
        "encoder.clip": "int8_rows",
        "merger": "float",
        "lm": "int4_weights",
    }
    choice = Choice(forms, "int8_rows", (manifest.Trial("lm", "token", "float", 1.5, False),))
    monkeypatch.setattr(tune, "tuned", lambda *a, **k: choice)
    api.build_engine(bundle, tmp_path / "two", precision="int4", accept_loss=LOSS_IN_4_BITS)
    return tmp_path / "two"


def test_a_prompt_is_read_in_one_form_and_answered_in_the_other(
    two: Path, bundle: Path, tmp_path: Path
) -> None:
    for name in ("int8-rows", "int4-blocks"):
        api.build_engine(bundle, tmp_path / name, precision=name, accept_loss=LOSS_IN_4_BITS)
    engine = manifest.read(two)
    assert engine.prompt_form is not None
    assert "logits" not in {port.name for port in engine.prompt_form.record.outputs}
    assert set(engine.build.kernel_differences) >= {"lm", "lm, prompts"}
    ids = np.random.default_rng(1).integers(3, 200, (1, 9))
    inputs = {
        "ids": ids, "rows": np.full((1, 9), -1), "features": np.zeros((1, 32), np.float32),
        "start": np.zeros(1, np.int64), "score": np.asarray([[8]]),
    }  # fmt: skip
    with (
        Session.open(two) as both,
        Session.open(tmp_path / "int8-rows") as rows,
        Session.open(tmp_path / "int4-blocks") as blocks,
    ):
        width = both.model.lm.config.hidden_size
        inputs["features"] = np.zeros((1, width), np.float32)
        found = both._lm.run(inputs, both.new_state())["logits"][0, 0]
        state = rows.new_state()
        rows._lm.run({**inputs, "ids": ids[:, :8], "rows": inputs["rows"][:, :8],
                      "score": np.zeros((1, 0), np.int64)}, state)  # fmt: skip
        expected = blocks.decode(int(ids[0, 8]), 8, state)
        np.testing.assert_array_equal(found, expected)
        assert both.layers() is not None
        guessed = PromptSequence(ids[:, :4], np.full((1, 4), -1))
        rows_of = [s.read_piece(guessed, 0, inputs["features"], s.new_state(), 4).copy()
                   for s in (both, blocks)]  # fmt: skip
        np.testing.assert_array_equal(*rows_of)  # in one call of the form for tokens


def test_a_bundle_in_4_bits_gets_a_second_form_too(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = replace(systems.load(bundle, Options()), plan=weight_only.plan("int4"))
    write.write_bundle(source, tmp_path / "b", made_by="tests", progress=silent)
    rows = Choice({"lm": "int4_weights"}, "int8_rows")
    monkeypatch.setattr(tune, "tuned_prompts", lambda *a, **k: rows)
    found = {}
    for name, tuned in (("two", True), ("one", False)):
        made = api.build_engine(
            tmp_path / "b", tmp_path / name, tune=tuned, accept_loss=LOSS_IN_4_BITS
        )
        assert (made.prompt_form is not None) == tuned
        assert ("--no-tune" in made.rebuild_command(tmp_path / name)) != tuned
        found[name] = made.build.precision_losses
    assert found["two"]["lm"] == found["one"]["lm"]
    assert 0 < found["two"]["lm, prompts"] <= LOSS_IN_4_BITS
    plan = found["two"].keys() - found["one"].keys()
    assert plan == {"lm, prompts"}


def test_such_an_engine_answers_and_says_what_was_chosen(two: Path, bundle: Path) -> None:
    image = next((GOLDEN).glob("*.png"))
    answer = ask(two, "USER: <image>\nwhat? ASSISTANT:", [image], tokens=4)
    assert len(answer.token_ids) >= 1
    engine = manifest.read(two)
    assert engine.trials[0].ms == 1.5
    assert "--precision int4" in engine.rebuild_command(two)
    whole = json.loads((two / "engine.json").read_text())
    assert whole["prompt_form"]["record"]["weights"] == "lm.prompt.safetensors"
    assert (two / "lm.prompt.safetensors").stat().st_size < (
        Path(bundle) / "lm.safetensors"
    ).stat().st_size


class Recorder:
    """A Runner that answers with the token that it saw last, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def new_state(self, slots: int = 1) -> State:
        raise NotImplementedError

    def run(self, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        self.calls.append((inputs["ids"][0].tolist(), int(inputs["start"][0])))
        last = inputs["ids"][:, -1:, None].astype(np.float32)
        return {"logits": last, "hidden": -last}

    def layers(self) -> list[LayerTime]:
        return [LayerTime("node", "Op", float(len(self.calls)), 1)]

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("score", "read_at_once", "alone"),
    [([4], 4, [14]), ([], 5, []), ([4, 2], 2, [12, 13, 14]), ([0], 0, [10, 11, 12, 13, 14])],
)
def test_only_what_is_scored_is_read_alone(
    score: list[int], read_at_once: int, alone: list[int]
) -> None:
    prompts, tokens = Recorder(), Recorder()
    ids = np.arange(10, 15)[None]
    outputs = TwoForms(prompts, tokens).run(
        {
            "ids": ids, "rows": np.full((1, 5), -1), "features": np.zeros((1, 4), np.float32),
            "start": np.asarray([7]), "score": np.asarray([score], np.int64).reshape(1, -1),
        }
    )  # fmt: skip
    found = outputs["logits"]
    if score:
        assert np.array_equal(outputs["hidden"], -found)
    assert [call[0] for call in prompts.calls] == (
        [ids[0, :read_at_once].tolist()] if read_at_once else []
    )
    assert [call[0] for call in tokens.calls] == [[token] for token in alone]
    assert [call[1] for call in tokens.calls] == [7 + token - 10 for token in alone]
    assert found[..., 0].tolist() == [[10 + at for at in score]] if score else found.size == 0


def test_what_is_not_measured_depends_on_the_target(bundle: Path) -> None:
    model = Bundle.open(bundle).model
    for kind, form in (("int8", "int8_weights"), ("int4", "int4_weights")):
        on_card = tune.untuned(model, kind, parse("onnxruntime-cuda/sm_89")).forms
        assert on_card == {"encoder.clip": "float", "merger": "float", "lm": form}
        elsewhere = tune.untuned(model, kind, parse("jetson-agx-orin")).forms
        assert elsewhere["merger"] == "int8_rows"
