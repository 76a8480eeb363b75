"""Opened engines on a stood-in card: what is refused, what is freed, what goes another way."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import RunnerOptions
from edgevlm.engines.backends.tensorrt import TensorRT, arrays, device
from edgevlm.engines.backends.tensorrt.arrays import DeviceArray
from edgevlm.engines.backends.tensorrt.device import CardFacts
from edgevlm.engines.backends.tensorrt.flavours import FLAVOURS
from edgevlm.engines.backends.tensorrt.runner import TensorRTRunner
from edgevlm.engines.backends.tensors import join, keep
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import (
    BuildError,
    BundleError,
    InputError,
    MissingExtra,
    OutOfMemory,
    TargetMismatch,
    UnsupportedError,
)
from tests.engines.backends.tensorrt.conftest import GOLDEN, Built, Install
from tests.engines.backends.tensorrt.cuda_standin import CudaError, World
from tests.engines.backends.tensorrt.machine import Machine
from tests.engines.backends.tensorrt.test_sessions import QUESTION, expected
from tests.engines.backends.tensorrt.trt_standin import IExecutionContext
from tests.sealing import reseal

NEW, OLD, RTX = "11.4.0.106", "10.3.0", "rtx-1.7.1.116"


def nothing_is_held(world: World) -> bool:
    return (world.live, world.host, world.streams, world.graphs) == (0, {}, {}, 0)


def opened(engine: Path, name: str, machine: Machine, **options: Any) -> TensorRTRunner:
    made = manifest.read(engine)
    record = next(r for r in made.components if r.name == name)
    backend = TensorRT(FLAVOURS[machine.flavour.backend])
    runner = backend.open(engine, record, made.model, RunnerOptions(made.context, **options))
    assert isinstance(runner, TensorRTRunner)
    return runner


# -- what cannot be opened -------------------------------------------------------------------


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Any:
    def copied(release: str) -> Path:
        return Path(shutil.copytree(built(release), tmp_path / "engine"))

    return copied


@pytest.mark.parametrize("release", [OLD, RTX])
@pytest.mark.parametrize("damage", ["head", "tail"])
def test_a_damaged_plan_is_told(release: str, damage: str, copy: Any, install: Install) -> None:
    engine, machine = copy(release), install(release)
    plan = engine / "merger.plan"
    data = bytearray(plan.read_bytes())
    if damage == "head":
        data[:4] = b"xxxx"
    else:  # of the same size, which is all that opening compares by itself
        size = int.from_bytes(data[4:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["graph"] += 1
        text = json.dumps(header).encode()
        assert len(text) == size
        data[8 : 8 + size] = text
    plan.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"merger\.plan is damaged"):
        Session.open(engine)
    reseal(engine / "engine.json")
    with pytest.raises(BuildError, match=r"cannot load merger.plan: the file is damaged") as odd:
        Session.open(engine)
    assert odd.value.hint.startswith("build it again: edgevlm build ")
    assert nothing_is_held(machine.world)


@pytest.mark.parametrize(
    ("release", "change"),
    [(OLD, {"version": "10.3.1"}), (RTX, {"version": "1.7.1.999"}), (RTX, {"cards": ["sm_8x"]})],
)
def test_a_plan_of_another_release_or_card_is_a_mismatch(
    release: str, change: dict[str, Any], copy: Any, install: Install
) -> None:
    engine, machine = copy(release), install(release)
    plan = engine / "lm.plan"
    data = plan.read_bytes()
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(data[8 : 8 + size]) | change
    text = json.dumps(header).encode()
    changed = data[:4] + len(text).to_bytes(4, "little") + text + data[8 + size :]
    plan.write_bytes(changed)
    reseal(engine / "engine.json")
    with pytest.raises(TargetMismatch, match=r"lm.plan was built for another release") as odd:
        Session.open(engine)
    assert odd.value.hint.startswith("build it again: edgevlm build ")
    assert f"--target {machine.target}" in odd.value.hint
    assert nothing_is_held(machine.world)


def test_an_empty_plan_is_told(copy: Any, install: Install) -> None:
    engine, machine = copy(NEW), install(NEW)
    (engine / "lm.plan").write_bytes(b"")
    with pytest.raises(BuildError, match=r"lm.plan: the file is empty"):
        opened(engine, "lm", machine)
    assert nothing_is_held(machine.world)


def test_memory_that_is_not_there(built: Built, install: Install) -> None:
    engine, machine = built(NEW), install(NEW)
    machine.world.capacity = 8000  # enough for the encoder's activations, not for the others'
    with pytest.raises(OutOfMemory, match="more of memory of the card are not free") as odd:
        Session.open(engine)
    assert "--max-context" in odd.value.hint
    assert nothing_is_held(machine.world)
    machine.world.capacity = 1 << 30
    with Session.open(engine) as session:
        machine.world.capacity = machine.world.live
        with pytest.raises(OutOfMemory):
            session.new_state()
        machine.world.capacity = 1 << 30
        assert list(session.answer(QUESTION).token_ids) == expected()
    assert nothing_is_held(machine.world)


def test_the_host_counts_only_memory_that_it_shares(
    built: Built, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = built(NEW)
    install(NEW)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    for shared in (False, True):
        facts = CardFacts("card", "13.0", 1 << 30, shared)
        monkeypatch.setattr(device, "facts", lambda number=0, facts=facts: facts)
        if shared:
            with pytest.raises(OutOfMemory, match="of memory"):
                Session.open(engine)
        else:
            with Session.open(engine) as session:
                session.states.take()
                session.states.take()


@pytest.mark.parametrize("at", ["create_stream", "get_tensor_dtype", "device_memory_size_v2"])
def test_opening_that_fails_holds_nothing(
    at: str, built: Built, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engines.backends.tensorrt import cuda_standin, trt_standin

    engine, machine = built(NEW), install(NEW)

    def failing(*given: Any, **named: Any) -> Any:
        raise CudaError("CUDA_ERROR_UNKNOWN")

    kind: Any = cuda_standin.Device if at == "create_stream" else trt_standin.ICudaEngine
    if at == "create_stream":
        monkeypatch.setattr(kind, at, failing)
    else:
        made: Any = trt_standin._classes(machine.made)["ICudaEngine"]
        monkeypatch.setattr(made, at, failing if at.startswith("get") else property(failing))
    with pytest.raises((CudaError, TargetMismatch)):
        opened(engine, "lm", machine)
    assert nothing_is_held(machine.world)


def test_without_cuda_core_the_extra_is_named(
    built: Built, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    for release, extra in ((NEW, "tensorrt"), (RTX, "tensorrt-rtx")):
        engine, machine = built(release), install(release)
        monkeypatch.setitem(sys.modules, "cuda.core", None)
        with pytest.raises(MissingExtra, match="running a TensorRT engine needs") as odd:
            opened(engine, "merger", machine)
        assert odd.value.hint == f"pip install 'edgevlm[{extra}]'"


# -- what is run in another way ------------------------------------------------------------------


@pytest.mark.parametrize("release", [OLD, RTX])
def test_what_cannot_be_captured_runs_without_a_graph(
    release: str, built: Built, install: Install
) -> None:
    engine, machine = built(release), install(release)
    machine.made.capturable = False
    with Session.open(engine) as session:
        assert list(session.answer(QUESTION).token_ids) == expected()
    assert machine.world.names().count("launch") == 0
    assert nothing_is_held(machine.world)


def test_a_graph_is_recorded_again_when_the_arena_moves(built: Built, install: Install) -> None:
    engine, machine = built(NEW), install(NEW)
    with Session.open(engine) as session:
        state = session.new_state()
        logits = [session.decode(5, at, state) for at in range(3)]
        assert machine.world.names().count("graph") == 1
        runner: Any = session._runners["lm"]
        runner._lane.arena.reserve(100_000)
        logits += [session.decode(5, 3, state), session.decode(5, 4, state)]
        assert machine.world.names().count("graph") == 2
        other = session.new_state()
        for at, found in enumerate(logits):
            np.testing.assert_array_equal(session.decode(5, at, other), found)


def test_layers_are_timed_and_named(built: Built, install: Install) -> None:
    engine, machine = built(NEW), install(NEW)
    with Session.open(engine, profile=True) as session:
        session.answer(QUESTION)
        times = session.layers()
    assert "launch" not in machine.world.names()  # a graph reports no layers
    assert [(t.name, t.total_ms, t.calls) for t in times["merger"]] == [
        ("_mha_myl0_2", 1.5, 1),
        ("_gemm_myl0_1", 0.5, 1),
    ]
    assert times["lm"][0].calls == 24
    with Session.open(engine) as session:
        assert session.layers() == {"encoder.clip": [], "merger": [], "lm": []}


def test_calls_that_the_engine_was_not_built_for(built: Built, install: Install) -> None:
    engine, machine = built(NEW), install(NEW)
    with Session.open(engine) as session:
        lm: Any = session._runners["lm"]
        inputs = _prompt(session, 257)
        with pytest.raises(InputError, match=r"lm was not built for calls of this size") as odd:
            lm.run(inputs, session.new_state())
        assert "--max-context" in odd.value.hint
        with pytest.raises(InputError, match="lm needs a state of its own"):
            lm.run(_prompt(session, 3))
        with pytest.raises(InputError, match="was given 1 rows for 2 slots"):
            lm.run(_prompt(session, 3), session.new_state(2))
        with pytest.raises(InputError, match="holds nothing"):
            session.new_state(0)
    assert nothing_is_held(machine.world)


def _prompt(session: Session, length: int, scored: int = 1) -> dict[str, Any]:
    width = session.model.lm.config.hidden_size
    return {
        "ids": np.full((1, length), 5, np.int64),
        "rows": np.full((1, length), -1, np.int64),
        "features": np.zeros((1, width), np.float32),
        "start": np.zeros(1, np.int64),
        "score": np.full((1, scored), length - 1, np.int64),
    }


def test_an_empty_axis_is_filled_and_cut_away(built: Built, install: Install) -> None:
    engine = built(NEW)
    machine = install(NEW)
    with Session.open(engine) as session:
        lm, vocab = session._runners["lm"], session.model.lm.config.vocab_size
        state = session.new_state()
        assert lm.run(_prompt(session, 9, 0), state)["logits"].shape == (1, 0, vocab)
        after = session.decode(7, 9, state)
        other = session.new_state()
        assert lm.run(_prompt(session, 9), other)["logits"].shape == (1, 1, vocab)
        np.testing.assert_array_equal(session.decode(7, 9, other), after)
    assert nothing_is_held(machine.world)


# -- arrays on the card --------------------------------------------------------------------------


def test_outputs_are_kept_joined_and_read_back(built: Built, install: Install) -> None:
    engine, machine = built(NEW), install(NEW)
    runner = opened(engine, "encoder.clip", machine)
    side = int(manifest.read(engine).components[0].inputs[0].shape[-1])
    generator = np.random.default_rng(1)
    views = [generator.normal(size=(1, 3, side, side)).astype(np.float32) for _ in range(2)]
    kept = [keep(runner, {"pixels": view})["features.0"] for view in views]
    apart = [runner.run({"pixels": view})["features.0"] for view in views]
    both = join(kept)
    assert isinstance(both, DeviceArray)
    np.testing.assert_array_equal(both.numpy(), np.concatenate(apart))
    np.testing.assert_array_equal(both[1:].numpy(), apart[1])
    # a profile takes one view: several go row by row, on the card and off it
    many = {"pixels": np.concatenate(views)}
    np.testing.assert_array_equal(runner.run(many)["features.0"], np.concatenate(apart))
    np.testing.assert_array_equal(keep(runner, many)["features.0"].numpy(), np.concatenate(apart))
    runner.close()
    assert nothing_is_held(machine.world)
    with pytest.raises(InputError, match="session that held this memory is closed"):
        assert both.pointer
    with pytest.raises(InputError, match="is closed"):
        runner.run({"pixels": views[0]})


@pytest.mark.parametrize(("kind", "exact"), [("FLOAT", True), ("HALF", False), ("BF16", False)])
def test_formats(kind: str, exact: bool) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    target = np.zeros((4, 4), arrays.stored(kind))
    arrays.write(target, values, kind)
    found = arrays.read(target, kind)
    assert found.dtype == np.float32
    assert (found[3] == 0).all()
    np.testing.assert_allclose(found[:3], values, rtol=0 if exact else 2**-8)
    with pytest.raises(UnsupportedError, match="INT4"):
        arrays.stored("INT4")


def test_slots_begin_where_tensorrt_lets_tensors_begin(built: Built, install: Install) -> None:
    engine, machine = built(OLD), install(OLD)
    runner = opened(engine, "lm", machine)
    state = runner.new_state(3)
    pointers = {array.pointer for slot in range(3) for array in state.slot(slot).arrays.values()}
    assert len(pointers) == 3 * len(state.arrays)
    assert {pointer % 256 for pointer in pointers} == {0}
    fills = [entry for entry in machine.world.log if entry[0] == "fill"]
    assert len(fills) == 1  # what was in the memory before may be no number
    runner.close()


@pytest.mark.parametrize("release", [OLD, NEW])
def test_slots_of_any_length(release: str, built: Built, install: Install, tmp_path: Path) -> None:
    """A slot of 35 positions in fp16 is no multiple of 256 bytes."""
    engine, machine = tmp_path / "engine", install(release)
    bundle = tmp_path / "bundle"
    api.export_bundle(GOLDEN / "llava-v1.5-tiny", bundle, dtype="fp16")
    api.build_engine(bundle, engine, target=str(machine.target), max_context=35)
    with Session.open(engine) as session:
        state = session.new_state(2)
        slot: Any = state.slot(0).arrays["past.0.key"]
        assert slot.nbytes % 256
        one = [session.decode(3, at, state.slot(0)) for at in range(4)]
        both = [session.decode_batch([3], [at], state.slot(1)) for at in range(4)]
        again = session.decode_batch([5, 5], [4, 4], state)
    np.testing.assert_array_equal(np.stack(one), np.concatenate(both))
    np.testing.assert_array_equal(again[0], again[1])
    assert nothing_is_held(machine.world)


def test_contexts_report_what_tensorrt_says(
    built: Built, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, machine = built(NEW), install(NEW)
    refused = IExecutionContext._no

    def no(self: IExecutionContext, *given: Any) -> bool:
        return refused(self, "it is Thursday")

    from tests.engines.backends.tensorrt import trt_standin

    made: Any = trt_standin._classes(machine.made)["IExecutionContext"]
    monkeypatch.setattr(made, "execute_async_v3", no)
    with (
        Session.open(engine) as session,
        pytest.raises(BuildError, match="TensorRT refused running: it is Thursday"),
    ):
        session.decode(3, 0, session.new_state())


# -- components side by side -----------------------------------------------------------------------


def test_encoders_side_by_side_have_memory_of_their_own(tmp_path: Path, install: Install) -> None:
    from tests.pipeline import ask, engine_of
    from tests.systems import test_comm
    from tests.systems.test_huggingface import IMAGE

    test_comm.write(tmp_path / "comm")
    cpu = engine_of(tmp_path / "comm", tmp_path)
    machine = install(NEW)
    engine = tmp_path / "engine"
    api.build_engine(tmp_path / "bundle", engine, target=str(machine.target))
    images = [IMAGE]
    wanted = ask(cpu, test_comm.PROMPT, images, 8).token_ids
    machine.world.log.clear()
    with Session.open(engine) as session:
        assert session.vision._pool is not None
        memory = [e for e in machine.world.log if e[0] == "allocate"]
        assert len(memory) >= 3  # two encoders, and the arena that the others share
    assert ask(engine, test_comm.PROMPT, images, 8).token_ids == wanted
    arenas = {e[1] for e in machine.world.log if e[0] == "IExecutionContext.set_device_memory"}
    assert len(arenas) == 3
    assert nothing_is_held(machine.world)


# -- what is kept between runs ---------------------------------------------------------------------


def test_rtx_keeps_what_it_compiled(built: Built, install: Install, tmp_path: Path) -> None:
    engine, machine = built(RTX), install(RTX)
    with Session.open(engine) as session:
        session.answer(QUESTION)
    kept = sorted((tmp_path / "cache/edgevlm/rtx").glob("*.cache"))
    assert [file.name.rpartition("-")[0] for file in kept] == ["encoder.clip", "lm", "merger"]
    assert kept[1].read_bytes() == b"kk"  # prompts, and the graph of tokens
    machine.world.log.clear()
    with Session.open(engine) as session:
        session.answer(QUESTION)
    read = [e[1] for e in machine.world.log if e[0] == "IRuntimeCache.deserialize"]
    assert b"kk" in read
    assert backends.backend(machine.target).here().arch == "sm_89"
