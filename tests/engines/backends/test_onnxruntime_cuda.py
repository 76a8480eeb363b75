"""ONNX Runtime on a card, without one: the same code over the processor's provider, and over a
stand-in whose memory only sessions reach.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from edgevlm.calibration import weight_only
from edgevlm.engines.backends import (
    RunnerOptions,
    cuda_probes,
    cuda_sessions,
    device_array,
    onnxruntime_cuda,
)
from edgevlm.engines.backends.cuda_sessions import Provider, check_placement
from edgevlm.engines.backends.device_array import Device
from edgevlm.engines.build.build import Requantization, Request, build
from edgevlm.engines.manifest import Engine
from edgevlm.engines.runtime.session import Session
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import (
    BuildError,
    InputError,
    OutOfMemory,
    TargetMismatch,
    UnsupportedError,
)
from edgevlm.toolkit.target import CUDA, Target, installed, this_cpu
from edgevlm.training.torch_files import reader
from tests.conftest import HERE
from tests.engines.backends.device import Card, package
from tests.pipeline import LOSS_IN_4_BITS, ask, silent

GOLDEN = HERE / "goldens/e2e_llava15"
IMAGE = GOLDEN / "image.png"
PROMPT = "hello <image> what"
TELLS = hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")
pytestmark = pytest.mark.skipif(not TELLS, reason="ONNX Runtime before 1.24 tells no node's place")
PROCESSOR = Provider("CPUExecutionProvider", Device("cpu"), captures=True)
CARD = Target(CUDA, installed("onnxruntime"), "sm_89")


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend over ONNX Runtime's provider for the processor."""
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", PROCESSOR)
    monkeypatch.setattr(onnxruntime_cuda, "here", lambda: CARD)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A stand-in for a card. Engines are built before, over the processor's provider."""
    made = Card()
    monkeypatch.setattr(onnxruntime_cuda, "here", lambda: CARD)
    monkeypatch.setattr(onnxruntime_cuda, "PROVIDER", cuda_sessions.CUDA)
    monkeypatch.setitem(sys.modules, "onnxruntime", package(made))
    yield made


def bundle_of(folder: Path, dtype: str) -> Path:
    """The tiny LLaVA-1.5 as a bundle."""
    source = systems.load(GOLDEN / "llava-v1.5-tiny", Options(torch_reader=reader()))
    write.write_bundle(source, folder, dtype=dtype, made_by="tests", progress=silent)
    return folder


def requantized(bundle: Path, kind: str, dtype: str) -> Request:
    """A request for weights in fewer bits beside floats of `dtype`."""
    source = systems.load(bundle, Options())
    plan = weight_only.plan(kind)
    changed = type(source)(**{**vars(source), "plan": plan})

    def written(folder: Path) -> None:
        write.write_bundle(changed, folder, dtype=dtype, made_by="tests", progress=silent)

    form = Requantization(kind, plan, written, lambda: write.graphs(changed, dtype))
    return Request(CARD, None, False, "tests", requantization=form, accept_loss=LOSS_IN_4_BITS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines by number format, built over the processor's provider; and the processor's own."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_cuda, "PROVIDER", PROCESSOR)
        patch.setattr(onnxruntime_cuda, "here", lambda: CARD)
        for dtype in ("fp32", "fp16"):
            folder = tmp_path_factory.mktemp(dtype)
            bundle = bundle_of(folder / "bundle", dtype)
            for name, target in ((dtype, CARD), (f"{dtype} processor", this_cpu())):
                found[name] = folder / name.replace(" ", "-")
                build(bundle, found[name], Request(target, None, False, "tests"), silent)
    return found


def described(folder: Path) -> Engine:
    from edgevlm.engines import manifest

    return manifest.read(folder)


# -- over the processor's provider ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_tokens_are_those_of_the_processor(
    dtype: str, built: dict[str, Path], on_processor: None
) -> None:
    ours, theirs = (ask(built[name], PROMPT, [IMAGE]) for name in (dtype, f"{dtype} processor"))
    assert ours.text == theirs.text
    limit = {"fp32": 1e-5, "fp16": 1e-2}[dtype]
    errors = described(built[dtype]).build.kernel_differences
    assert set(errors) == {"encoder.clip", "merger", "lm"}
    assert max(errors.values()) < limit


@pytest.mark.parametrize(
    ("kind", "limit"), [("int4-blocks", 1e-2), ("int8-blocks", 1e-2), ("int8-rows", 5e-2)]
)
def test_weights_in_codes(
    kind: str, limit: float, built: dict[str, Path], on_processor: None, tmp_path: Path
) -> None:
    """Codes by channel are written by output; there the reference rounds inputs, the card not."""
    bundle = built["fp16"].parent / "bundle"
    engine, _ = build(bundle, tmp_path / "engine", requantized(bundle, kind, "fp16"), silent)
    assert max(engine.build.kernel_differences.values()) < limit
    assert max(engine.build.precision_losses.values()) < {"int4-blocks": 0.5}.get(kind, 0.05)
    into = {d.into for d in engine.lowering}
    assert "com.microsoft.MatMulNBits" in into
    assert ask(tmp_path / "engine", PROMPT, [IMAGE], 4).text


def test_weights_in_float_are_those_of_the_bundle(built: dict[str, Path]) -> None:
    """Nothing is upcast: the files are the same."""
    for name in ("encoder.clip", "merger", "lm"):
        file = f"{name}.safetensors"
        content = (built["fp16"].parent / "bundle" / file).read_bytes()
        assert (built["fp16"] / file).read_bytes() == content


def test_states_are_in_the_format_of_the_model(built: dict[str, Path], on_processor: None) -> None:
    for dtype in ("fp32", "fp16"):
        with Session.open(built[dtype]) as session:
            state = session.new_state(3)
            array = state.arrays["past.0.key"]
            assert (array.dtype, array.shape[0]) == (dtype, 3)
            part = state.slots(1, 3).arrays["past.0.key"]
            size = {"fp32": 4, "fp16": 2}[dtype] * int(np.prod(array.shape[1:]))
            assert part.address == array.address + size
            assert part.shape == (2, *array.shape[1:])
            assert part[1:2].address == array[2:3].address
            with pytest.raises(InputError, match="needs a state"):
                session.decode_batch([1], [0], type(state)({}, 1, state.allocation))


def test_slots_decode_as_sequences_alone(built: dict[str, Path], on_processor: None) -> None:
    """Two prompts in two slots, one batch of tokens: the logits of each alone."""
    with Session.open(built["fp32"]) as session:
        prompts, none = ([5, 6, 7], [9, 4]), np.zeros((1, session.model.lm.config.hidden_size))

        def read(prompt: list[int], state: object) -> None:
            rows = np.full((1, len(prompt)), -1, np.int64)
            session._lm.run(
                {
                    "ids": np.asarray([prompt]),
                    "rows": rows,
                    "features": none.astype(np.float32),
                    "start": np.asarray([0]),
                    "score": np.zeros((1, 0), np.int64),
                },
                state,  # type: ignore[arg-type]
            )

        both = session.new_state(2)
        for slot, prompt in enumerate(prompts):
            read(prompt, both.slot(slot))
        together = session.decode_batch([3, 8], [3, 2], both)
        for slot, (prompt, token) in enumerate(zip(prompts, (3, 8), strict=True)):
            alone = session.new_state()
            read(prompt, alone)
            logits = session.decode(token, len(prompt), alone)
            np.testing.assert_allclose(together[slot], logits, atol=1e-5)


def test_peaks_are_measured(on_processor: None, tmp_path: Path) -> None:
    assert cuda_probes.write(tmp_path) == (cuda_probes.FILE,)
    peaks = cuda_probes.measure(tmp_path, PROCESSOR, (8, 16, 32))
    assert min(peaks.gflop_s, peaks.int8_gop_s, peaks.gb_s) > 0


# -- over the stand-in ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_tokens_are_the_same_from_the_memory_of_a_card(
    dtype: str, built: dict[str, Path], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ask(built[dtype], PROMPT, [IMAGE]).text
    monkeypatch.undo()
    assert found == ask(built[f"{dtype} processor"], PROMPT, [IMAGE]).text


def test_a_decode_step_is_one_graph_and_copies_what_changes(
    built: dict[str, Path], card: Card
) -> None:
    with Session.open(built["fp16"]) as session:
        state = session.new_state()
        logits = [session.decode(5, 0, state).copy()]
        before, card.copies[:], card.runs[:] = len(card.memory), [], []
        logits += [session.decode(6, 1, state).copy(), session.decode(7, 2, state).copy()]
        assert len(card.memory) == before  # nothing is allocated
        copied = [nbytes for way, nbytes in card.copies if way == "to the card"]
        assert copied == [8, 8] * 2  # the token and its position
        assert len([way for way, _ in card.copies if way == "from the card"]) == 2
        assert len(set(card.runs)) == 1
        (graph, _), *_ = card.runs
        assert graph > 0
        again = session.new_state()
        session.decode(5, 0, again)
        assert card.runs[-1][0] not in (graph, -1)  # other memory, another graph
        del again
        gc.collect()
        assert card.released == [card.runs[-1][0]]
    assert not np.array_equal(logits[0], logits[1])


def test_prompts_are_no_graphs(built: dict[str, Path], card: Card) -> None:
    ask(built["fp16"], PROMPT, [IMAGE], 2)
    graphs = [graph for graph, _ in card.runs]
    assert graphs[:-1] == [-1] * (len(graphs) - 1)
    assert graphs[-1] > 0


def test_only_the_decoder_captures_and_nothing_doubles(
    built: dict[str, Path], card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    with Session.open(built["fp16"]):
        pass
    captures = [given.get("enable_cuda_graph", "0") for given in card.options]
    assert sorted(captures) == ["0", "0", "1"]
    assert {given["arena_extend_strategy"] for given in card.options} == {"kSameAsRequested"}
    assert {given["use_tf32"] for given in card.options} == {"0"}
    print("still here")  # the package's words on missing libraries are not, whoever opens what
    assert capsys.readouterr().out == "still here\n"


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("lm/layers.0/mlp/up", "MatMul"),
        ("lm/layers.0/mlp/Add", "Add"),  # as arithmetic on shapes is, but of floats
        ("features/cast", "Cast"),
    ],
)
def test_an_op_on_the_processor_is_an_error_that_names_it(
    name: str, op: str, built: dict[str, Path], card: Card
) -> None:
    card.elsewhere += [(name, op), ("lm/Squeeze", "Squeeze"), ("gqa.size", "Max")]
    with pytest.raises(BuildError, match=rf"{name} \({op}\) would run on the processor") as e:
        Session.open(built["fp16"])
    assert "Squeeze" not in e.value.message


def test_a_session_without_a_card_is_an_error() -> None:
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(BuildError, match="could not start CUDA") as refused:
        check_placement(session, cuda_sessions.CUDA, "lm")
    assert "pip install" in refused.value.hint
    old = SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])
    with pytest.raises(UnsupportedError, match="cannot say where") as too_old:
        check_placement(old, cuda_sessions.CUDA, "lm")
    assert "1.24" in too_old.value.hint


def test_a_graph_that_cannot_be_captured_runs_without(
    built: dict[str, Path], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = sys.modules["onnxruntime"]
    made = stand_in.InferenceSession

    def refusing(
        *given: object, providers: list[tuple[str, dict[str, str]]], **rest: None
    ) -> object:
        if "enable_cuda_graph" in providers[0][1]:
            raise RuntimeError("This session cannot use the graph capture feature as requested")
        return made(*given, providers=providers, **rest)

    monkeypatch.setattr(stand_in, "InferenceSession", refusing)
    with Session.open(built["fp16"]) as session:
        session.decode(5, 0, session.new_state())
        assert session._lm.captures is False  # type: ignore[attr-defined]
    assert card.runs[-1][0] == -1


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("BFCArena: Failed to allocate memory for requested buffer", OutOfMemory),
        ("CUDA error: out of memory", OutOfMemory),
        ("no such file", BuildError),
    ],
)
def test_what_onnxruntime_raises_is_told_by_kind(text: str, kind: type[Exception]) -> None:
    error = cuda_sessions.failed("loading", RuntimeError(text))
    assert type(error) is kind
    assert error.hint


def test_a_full_card_is_out_of_memory(
    built: dict[str, Path], card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session.open(built["fp16"]) as session:
        state = session.new_state()

        def full(*_: object) -> int:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer")

        monkeypatch.setattr(card, "allocate", full)
        with pytest.raises(OutOfMemory, match="a KV cache of 2 slots"):
            session.new_state(2)
        with pytest.raises(OutOfMemory, match="lm failed on the card"):
            session.decode(5, 0, state)
        with pytest.raises(InputError, match="0 slots"):
            session.new_state(0)


def test_a_damaged_graph_is_an_error(
    built: dict[str, Path], on_processor: None, tmp_path: Path
) -> None:
    folder = shutil.copytree(built["fp32"], tmp_path / "engine")
    (folder / "merger.onnx").write_bytes(b"nothing")
    record = next(c for c in described(folder).components if c.name == "merger")
    with pytest.raises(BuildError, match=r"cannot load merger\.onnx"):
        onnxruntime_cuda.open(folder, record, {}, RunnerOptions(context=16))


# -- where there is no card -----------------------------------------------------------------------


def test_a_build_without_a_card_is_refused_first(built: dict[str, Path], tmp_path: Path) -> None:
    request = Request(CARD, None, False, "tests")
    with pytest.raises(TargetMismatch, match="there is no NVIDIA card") as refused:
        build(built["fp16"].parent / "bundle", tmp_path / "engine", request, silent)
    assert "onnxruntime-gpu is not installed" in refused.value.message
    assert "on the machine that has the card" in refused.value.hint
    assert not (tmp_path / "engine").exists()
    with pytest.raises(TargetMismatch, match="no NVIDIA card") as refused:
        Session.open(built["fp16"])
    assert "--target cpu" in refused.value.hint


def test_arrays_know_their_memory() -> None:
    array = device_array.zeros((3, 2, 4), "bf16", Device("cpu"))
    assert array[2:3].address - array.address == 2 * 2 * 4 * 2
    assert array[1:].bound() == ("cpu", 0, 16, [2, 2, 4], array.address + 16)


def test_an_array_without_elements_has_an_address() -> None:
    array = device_array.empty((1, 0), "int64", Device("cpu"))
    assert array.shape == (1, 0)
    assert array.address
