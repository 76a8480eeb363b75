"""Fused plugins in engines: registered, taken, recorded, and refused where they cannot be.

The stand-in's parser takes plugins as TensorRT's does; a library is a file with functions, which
its engine computes. What NVIDIA's own code makes of our plugins: tests/kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from edgevlm import api
from edgevlm.engines import backends, manifest
from edgevlm.engines.backends import BuildOptions, Compiled, Plugin
from edgevlm.engines.backends.tensorrt import plugins
from edgevlm.engines.build import check, shapes
from edgevlm.engines.build import plugins as choice
from edgevlm.engines.build.build import build, lowering
from edgevlm.engines.build.kept import existing
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import (
    BuildError,
    ConfigError,
    MissingExtra,
    TargetMismatch,
    ToolkitError,
    UnsupportedError,
)
from edgevlm.toolkit.target import Target, card, parse
from tests.conftest import HERE
from tests.engines.backends.tensorrt.conftest import Install
from tests.engines.backends.tensorrt.machine import Machine, installed
from tests.pipeline import silent

GOLDEN = HERE / "goldens/e2e_mmfuser"
CASE = json.loads((GOLDEN / "case.json").read_text())
OP = "MSDeformAttn"
OLD, NEW = "10.3.0", "11.4.0.106"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MMFuser, whose merger calls deformable attention."""
    out = tmp_path_factory.mktemp("mmfuser") / "bundle"
    tower = GOLDEN / "clip-vit-tiny"
    api.export_bundle(GOLDEN / "llava-mmfuser-tiny", out, dtype="fp32", vision_tower=tower)
    return out


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not compiled here, so that Triton need not be installed."""
    monkeypatch.setattr(plugins, "find_spec", lambda name: SimpleNamespace(name=name))


def library(machine: Machine, bundle: Path, *names: str) -> Path:
    """Make the library of this machine, with plugins of these names."""
    file = plugins.library_file(machine.target)
    file.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.load(str(bundle / "merger.onnx"), load_external_data=False)
    made = onnx.ModelProto(functions=[f for f in model.functions if f.name in names])
    file.write_bytes(made.SerializeToString())
    return file


def request(bundle: Path, machine: Machine, asked: str, *, force: bool = False) -> Any:
    target = str(machine.target)
    return api.build_request(bundle, target=target, plugins=asked, force=force)


Engine = Callable[[str], Path]


@pytest.fixture(scope="module")
def with_plugin(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine with the plugin for a release, built once on its machine."""
    folder = tmp_path_factory.mktemp("engines")

    def made(release: str) -> Path:
        engine = folder / release
        if not engine.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
                patch.setattr(plugins, "find_spec", lambda name: SimpleNamespace(name=name))
                machine = installed(release, patch, folder / f"packages-{release}")
                library(machine, bundle, OP)
                made, _ = build(bundle, engine, request(bundle, machine, OP), silent)
                assert made.verified
        return engine

    return made


@pytest.mark.parametrize("release", [OLD, NEW])
def test_an_engine_with_a_plugin_answers_token_for_token(
    release: str, bundle: Path, with_plugin: Engine, install: Install
) -> None:
    folder, machine = with_plugin(release), install(release)
    if release == OLD:
        library(machine, bundle, OP)
    engine = manifest.read(folder)
    assert engine.plugins == (Plugin(OP, OP, "edgevlm", "1", library=release == OLD),)
    assert f"--plugins {OP}" in engine.rebuild_command(folder)
    with Session.open(folder) as session:
        question = Question(CASE["prompt"], [GOLDEN / "image.png"], 24, template="none")
        expected = np.load(GOLDEN / "outputs.npz")["greedy_ids"].tolist()
        assert list(session.answer(question).token_ids) == expected
    opened, same = Bundle.open(bundle), (engine.context, engine.model)
    for asked, kept in ((OP, True), ("none", False)):
        found = existing(opened, folder, request(bundle, machine, asked), *same)
        assert (found == engine) == kept


@pytest.mark.parametrize("release", ["10.13.3.9", "10.16.1.11"])
def test_a_component_takes_the_plugin(
    release: str, bundle: Path, install: Install, tmp_path: Path
) -> None:
    """Defined for the builder's process by aot.py; the engine needs nothing beside it."""
    machine = install(release)
    made = merger(bundle, machine, tmp_path)
    assert made.plugins == (Plugin(OP, OP, "edgevlm", "1", library=False),)
    assert f"{OP} is computed by the plugin edgevlm::{OP}" in made.notes
    opened, plain = Bundle.open(bundle), backends.backend(machine.target)
    for backend in (plain, backends.backend(machine.target, BuildOptions((OP,)))):
        errors = check.check(opened, [made], backend, tmp_path, 0.0, silent)
        assert errors.kernels["merger"] < 1e-5


def merger(bundle: Path, machine: Machine, folder: Path) -> Compiled:
    """The component that calls the plugin, compiled alone."""
    opened = Bundle.open(bundle)
    record = opened.manifest.component("merger")
    backend = backends.backend(machine.target, BuildOptions((OP,)))
    sizes = shapes.of("merger", opened.model, opened.vlm.lm.config.context)
    return backend.compile(bundle, "fp32", record, folder, machine.target, sizes)


def test_the_table_says_where_plugins_are(bundle: Path) -> None:
    target = "tensorrt@10.16/sm_87"
    asked = api.build_request(bundle, target=target, plugins=OP)
    (line,) = (d for d in lowering(Bundle.open(bundle), asked) if d.op == f"edgevlm.{OP}")
    assert (line.component, line.action, line.into) == ("merger", "swap", f"edgevlm.{OP}")
    assert "as asked, a plugin" in line.why


def test_a_library_that_is_missing_is_told_with_the_command_that_makes_it(
    bundle: Path, install: Install, tmp_path: Path
) -> None:
    machine, engine = install(OLD), tmp_path / "engine"
    with pytest.raises(BuildError, match="takes plugins from a library, and .* is not here") as odd:
        build(bundle, engine, request(bundle, machine, OP), silent)
    assert not engine.exists()
    command = plugins.make_command(machine.target)
    assert odd.value.hint == f"make it on this device: {command}"
    words = command.split()
    assert words[:2] == ["make", "-C"]
    assert (Path(words[2]) / "Makefile").exists()
    out = next(word.removeprefix("OUT=") for word in words if word.startswith("OUT="))
    assert plugins.library_file(machine.target) == Path(out) / plugins.LIBRARY
    assert "ARCHES=87" in words


def test_an_engine_without_its_library_is_refused(
    bundle: Path, with_plugin: Engine, install: Install
) -> None:
    folder, machine = with_plugin(OLD), install(OLD)
    with pytest.raises(BuildError, match="is not here") as gone:
        Session.open(folder)
    assert plugins.make_command(machine.target) in gone.value.hint
    library(machine, bundle)  # one without plugins
    with pytest.raises(TargetMismatch, match=f"needs the plugin edgevlm::{OP}, version 1") as odd:
        Session.open(folder)
    assert odd.value.hint.startswith("make it again: make -C ")
    assert machine.world.live == 0


def test_a_body_in_place_of_a_plugin_is_not_an_engine(
    bundle: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(NEW)
    monkeypatch.setattr(plugins, "to_register", lambda *_: {})
    with pytest.raises(BuildError, match=r"took 0 plugins for \d calls \(MSDeformAttn\)"):
        merger(bundle, machine, tmp_path)


def test_what_plugins_need_is_told_before_anything_is_built(
    bundle: Path, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = install(NEW)
    monkeypatch.setattr(plugins, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="compiling plugins needs the package 'triton'") as odd:
        build(bundle, tmp_path / "e", request(bundle, machine, OP), silent)
    assert "edgevlm[kernels]" in odd.value.hint
    with pytest.raises(UnsupportedError, match="no fused kernels for sm_75"):
        plugins.check_builds(Target("tensorrt", (11, 4), "sm_75"))


@pytest.mark.parametrize(
    ("target", "asked", "kind", "words"),
    [
        ("rtx-4090", OP, UnsupportedError, "TensorRT-RTX takes no plugins.*MSDeformAttn"),
        ("reference", OP, UnsupportedError, "takes no plugins of TensorRT"),
        ("h100", "LayerMerge", ConfigError, "--plugins LayerMerge has no effect"),
        ("h100", "SwiGLU", ConfigError, "--plugins SwiGLU: there is no such plugin"),
        ("h100", "", ConfigError, "there is no such plugin"),
    ],
)
def test_what_is_refused_by_name(
    target: str, asked: str, kind: type[ToolkitError], words: str, bundle: Path
) -> None:
    with pytest.raises(kind, match=words):
        api.build_request(bundle, target=target, plugins=asked)


def test_auto_takes_what_won_on_this_card(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(card, "name", lambda: "Orin (nvgpu)")
    target, told = parse("tensorrt@10.16/sm_87"), list[str]()

    def auto(at: Target = target) -> tuple[str, ...]:
        return choice.chosen("auto", bundle, at, told.append)

    assert auto() == ()
    assert "none was measured here" in told[-1]
    choice.keep(target, {OP: (0.9, 1.0), "LayerMerge": (0.1, 1.0)})
    assert [file.name for file in (tmp_path / "edgevlm/plugins").iterdir()] == [
        "times-10.16-sm-87-Orin-nvgpu.json"
    ]
    assert auto() == (OP,)  # the bundle merges no levels
    assert told[-1] == f"--plugins auto: {OP} took 0.900 ms, its body 1.000"
    choice.keep(target, {OP: (0.96, 1.0)})  # which is no gain to speak of
    assert auto() == ()
    assert choice.measured(target)["LayerMerge"] == (0.1, 1.0)
    assert auto(parse("tensorrt@10.3/sm_87")) == ()  # another release
    assert auto(parse("rtx-4090")) == ()
