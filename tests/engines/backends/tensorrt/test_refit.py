"""Plans without weights: what is stored where, put back when an engine is opened, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgevlm import api
from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import BuildOptions
from edgevlm.engines.backends.tensorrt import device
from edgevlm.engines.build import check, selftest, shapes
from edgevlm.engines.build.kept import existing
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.checkpoints.safetensors_io import SafetensorsFile
from edgevlm.toolkit.errors import BuildError, BundleError, UnsupportedError
from tests.engines.backends.tensorrt.conftest import GOLDEN, Install
from tests.engines.backends.tensorrt.machine import installed
from tests.engines.backends.tensorrt.test_sessions import QUESTION, expected

Engine = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("llava") / "bundle"
    api.export_bundle(GOLDEN / "llava-v1.5-tiny", out, dtype="fp32")
    return out


@pytest.fixture(scope="module")
def stripped(bundle: Path) -> Engine:
    """An engine without weights in its plans, built once for a release on its machine."""

    def made(release: str) -> Path:
        engine = bundle.parent / release
        if not engine.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(bundle.parent / "cache"))
                machine = installed(release, patch, bundle.parent / f"packages-{release}")
                target = str(machine.target)
                found = api.build_engine(bundle, engine, target=target, strip_weights=True)
                assert found.verified
        return engine

    return made


@pytest.mark.parametrize("release", ["10.3.0", "rtx-1.7.1.116"])
def test_an_engine_gets_its_weights_when_it_is_opened(
    release: str, bundle: Path, stripped: Engine, install: Install
) -> None:
    folder, machine = stripped(release), install(release)
    engine = manifest.read(folder)
    assert engine.stripped
    assert "--strip-weights" in engine.rebuild_command(folder)
    for record in engine.components:
        plan, weights = engine.files[record.graph], engine.files[record.weights]
        assert record.weights == f"{record.name}.safetensors"
        assert weights == Bundle.open(bundle).manifest.files[record.weights]  # the bundle's own
        assert engine.plans[record.name].plan_bytes == plan.nbytes
    lm = engine.components[-1]
    assert engine.files[lm.graph].nbytes < engine.files[lm.weights].nbytes / 2
    with Session.open(folder) as session:
        assert list(session.answer(QUESTION).token_ids) == expected()
    assert machine.world.names().count("Refitter.refit_cuda_engine") == 3
    assert machine.world.live == 0
    for strip in (True, False):
        target = str(machine.target)
        asked = api.build_request(bundle, target=target, strip_weights=strip)
        found = existing(Bundle.open(bundle), folder, asked, engine.context, engine.model)
        assert (found == engine) == strip


def test_the_time_of_refitting_is_reported(stripped: Engine, install: Install) -> None:
    folder, _ = stripped("10.3.0"), install("10.3.0")
    parts = selftest.of_engine(folder, lambda _: None)["engine"]["components"]
    for part in parts:
        assert 0 < part["refit_ms"] < part["open_ms"]
        assert set(part["bytes"]) == {f"{part['name']}.plan", f"{part['name']}.safetensors"}


def test_other_weights_are_refused(stripped: Engine, install: Install, tmp_path: Path) -> None:
    folder, machine = Path(shutil.copytree(stripped("10.3.0"), tmp_path / "e")), install("10.3.0")
    weights = folder / "merger.safetensors"
    entry = max(SafetensorsFile(weights).entries.values(), key=lambda e: e.nbytes)
    data = bytearray(weights.read_bytes())
    data[entry.offset + 2] ^= 0xFF
    weights.write_bytes(bytes(data))
    with pytest.raises(BuildError, match="cannot put the weights of merger.onnx into their") as odd:
        Session.open(folder)
    assert "is not what it was at build time" in odd.value.message
    assert odd.value.hint.startswith("build it again: edgevlm build ")
    assert "--strip-weights" in odd.value.hint
    weights.unlink()
    with pytest.raises(BundleError, match="merger.safetensors: missing"):
        Session.open(folder)
    assert machine.world.live == 0


def test_a_plan_that_takes_no_weights_is_no_engine(
    stripped: Engine, install: Install, tmp_path: Path
) -> None:
    folder, _ = Path(shutil.copytree(stripped("10.3.0"), tmp_path / "e")), install("10.3.0")
    plan = folder / "lm.plan"
    data = plan.read_bytes()
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(data[8 : 8 + size])
    filler = len(json.dumps(header["stripped"])) - len("{}")
    text = json.dumps(header | {"stripped": {}}) + " " * filler
    plan.write_bytes(data[:8] + text.encode() + data[8 + size :])
    with pytest.raises(BuildError, match="takes no weights"):
        Session.open(folder)


def test_codes_that_are_changed_for_the_card_lie_beside_the_plan(
    bundle: Path, install: Install, tmp_path: Path
) -> None:
    """And a component whose inputs the reference rounds has the tolerance for that."""
    machine, source, folder = install("11.4.0.106"), tmp_path / "int8", tmp_path / "e"
    folder.mkdir()
    target = str(machine.target)
    asked = api.build_request(bundle, target=target, precision="int8-rows", tune=False)
    assert asked.requantization is not None
    asked.requantization.write(source)
    coded, backend = Bundle.open(source), backends.backend(machine.target, BuildOptions(strip=True))
    sizes = shapes.of("merger", coded.model, coded.vlm.lm.config.context)
    record = coded.manifest.component("merger")
    made = backend.compile(source, "fp32", record, folder, machine.target, sizes)
    stored = SafetensorsFile(folder / made.record.weights)
    assert "int8" in {entry.dtype for entry in stored.entries.values()}
    assert made.precision == "int8_rows"
    errors = check.check(coded, [made], backend, folder, 0.9, lambda _: None)
    assert 1e-4 < errors.kernels["merger"] < 0.1


def test_what_cannot_be_stripped_is_refused(
    bundle: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("rtx-1.7.1.116")
    monkeypatch.setattr(device, "architecture", lambda number=0: None)
    for target, words in (
        ("tensorrt-rtx@1.7/sm_89", "strips plans of their weights only where there is a card"),
        ("cpu", "--strip-weights is for plans of TensorRT"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            api.build_engine(bundle, tmp_path / "e", target=target, strip_weights=True)
        assert not (tmp_path / "e").exists()
