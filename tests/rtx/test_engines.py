"""Engines of tiny systems out of NVIDIA's builder, for every card that it knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgevlm import api
from edgevlm.engines import backends, manifest
from edgevlm.engines.backends.tensorrt import builder, device
from edgevlm.engines.backends.tensorrt import plan as plans
from edgevlm.engines.backends.tensorrt.flavours import RTX
from edgevlm.engines.build import shapes
from edgevlm.engines.manifest import Engine
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.errors import BuildError, OutOfMemory, TargetMismatch, UnsupportedError
from edgevlm.toolkit.target import parse
from tests.conftest import HERE
from tests.test_pipeline import Shell, shell  # noqa: F401

GOLDENS = HERE / "goldens"
SYSTEMS: dict[str, tuple[Path, Path | None]] = {
    "llava": (GOLDENS / "e2e_llava15/llava-v1.5-tiny", None),
    "mmfuser": (GOLDENS / "e2e_mmfuser/llava-mmfuser-tiny", GOLDENS / "e2e_mmfuser/clip-vit-tiny"),
    "convllava": (
        GOLDENS / "e2e_convllava/convllava-tiny",
        GOLDENS / "e2e_convllava/convnext-tiny-5stage",
    ),
    "mlcd": (GOLDENS / "mlcd_llavanext_e2e", None),
}
HERE_RTX = "tensorrt-rtx@" + ".".join(map(str, RTX.installed()[:2]))
ALL_CARDS = "sm_80+sm_86+sm_89+sm_120"
Export = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Bundles by system and dtype, made once."""
    folder = tmp_path_factory.mktemp("bundles")

    def exported(system: str, dtype: str) -> Path:
        out = folder / f"{system}-{dtype}"
        if not out.exists():
            checkpoint, tower = SYSTEMS[system]
            api.export_bundle(checkpoint, out, dtype=dtype, vision_tower=tower)
        return out

    return exported


def build(bundle: Path, out: Path, cards: str = ALL_CARDS, precision: str | None = None) -> Engine:
    accept = 0.9 if precision else None
    return api.build_engine(
        bundle, out, target=f"{HERE_RTX}/{cards}", precision=precision, accept_loss=accept
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_all_systems_build_for_all_cards(
    system: str, dtype: str, export: Export, tmp_path: Path
) -> None:
    engine = build(export(system, dtype), tmp_path / "e")
    assert not engine.verified
    assert engine.build.kernel_differences == {}
    assert set(engine.plans) == {record.name for record in engine.components}
    for name, plan in engine.plans.items():
        assert plan.kernels > 0
        assert 0.9 < plan.held_weights_bytes / plan.given_weights_bytes < 2.1
        wide = not (system == "mlcd" and name == "lm")  # its heads have 8 channels
        assert plan.fused_attentions == (plan.attentions if wide else 0)
        listed = json.loads((tmp_path / "e" / f"{name}.kernels.json").read_text())
        assert len(listed) == plan.kernels
        nodes = {node for kernel in listed for node in kernel["nodes"]}
        assert any(node.startswith(f"{name}/") for node in nodes)


def test_tensors_within_a_component_become_outputs(export: Export, tmp_path: Path) -> None:
    """As --bisect builds it: every float tensor that both graphs have, all at once."""
    from edgevlm.engines.build.bisect_plans import shared, with_outputs

    bundle = Bundle.open(export("llava", "fp16"))
    for name, least in (("encoder.clip", 60), ("lm", 30)):
        record, target = bundle.manifest.component(name), parse(f"{HERE_RTX}/sm_89")
        backend = backends.backend(target)
        model, names = shared(bundle, record, target)
        assert len(names) > least
        sizes = shapes.of(name, bundle.model, bundle.vlm.lm.config.context)
        marked = with_outputs(model, names)
        made = backend.marked(bundle.path, record, marked, tmp_path, target, sizes)  # type: ignore[attr-defined]
        assert (tmp_path / made.graph).stat().st_size > 0


def test_the_oldest_card(export: Export, tmp_path: Path) -> None:
    assert build(export("llava", "fp16"), tmp_path / "e", "sm_75").plans["lm"].kernels > 0
    with pytest.raises(UnsupportedError, match="bf16 does not exist on sm_75"):
        build(export("llava", "bf16"), tmp_path / "f", "sm_75")


@pytest.mark.parametrize(("precision", "types"), [("int8", "Int8"), ("int4", "Int4")])
def test_weights_stay_in_codes(precision: str, types: str, export: Export, tmp_path: Path) -> None:
    engine = build(export("llava", "fp16"), tmp_path / "e", "sm_89", precision)
    kernels = json.loads((tmp_path / "e/lm.kernels.json").read_text())
    read = [kernel for kernel in kernels if types in kernel["types"]]
    linears = {node for kernel in read for node in kernel["nodes"] if "/layers." in node}
    paths = ("attention/q", "attention/out", "mlp/gate", "mlp/down")
    for path in paths:
        assert any(node.startswith(f"lm/layers.0/{path}") for node in linears), path
    assert engine.plans["lm"].fused_attentions == engine.plans["lm"].attentions


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("to", "kind", "cards", "keep"),
    [("int8-static", "Int8", "sm_89", ("lm/*",)), ("fp8", "FP8", "sm_89+sm_120", ())],
)
def test_products_of_rounded_inputs_are_computed_in_8_bits(
    to: str,
    kind: str,
    cards: str,
    keep: tuple[str, ...],
    export: Export,
    images: Path,
    shell: Shell,  # noqa: F811
    tmp_path: Path,
) -> None:
    bundle, out = tmp_path / "static", tmp_path / "e"
    api.calibrate(export("llava", "fp16"), bundle, images=images, to=to, keep_float=keep)
    target = f"{HERE_RTX}/{cards}"
    shell("build", bundle, out, "--target", target, "--accept-loss", "0.9")
    engine = manifest.read(out)
    kernels = json.loads((out / "encoder.clip.kernels.json").read_text())
    products = [k for k in kernels if k["kind"] == "gemm" and kind in k["types"]]
    assert len(products) >= 3  # a layer's q, k and v are one
    assert engine.plans["encoder.clip"].fused_attentions == 3
    for name, plan in engine.plans.items():
        assert bool(plan.rounded) == (name != "lm" or not keep)
        assert plan.rounded_kernels == plan.rounded
    said = f"all {engine.plans['merger'].rounded} products of inputs in {kind.upper()}"
    assert said in shell.errors


def test_cards_without_fp8_are_refused(export: Export, images: Path, tmp_path: Path) -> None:
    bundle, keep = tmp_path / "static", ("lm/*", "encoder.*")
    api.calibrate(export("llava", "fp16"), bundle, images=images, to="fp8", keep_float=keep)
    with pytest.raises(UnsupportedError, match="FP8 does not exist on sm_86") as caught:
        build(bundle, tmp_path / "e", "sm_86+sm_89")
    assert "int8-static" in caught.value.hint
    assert not (tmp_path / "e").exists()


def test_an_engine_for_another_card_is_not_run(
    shell: Shell,  # noqa: F811
    export: Export,
    tmp_path: Path,
) -> None:
    out = tmp_path / "e"
    made = shell.json("build", export("llava", "fp16"), out, "--target", f"{HERE_RTX}/rtx-4090")
    assert made["target"] == f"{HERE_RTX}/sm_89"
    assert made["next"] == f"edgevlm verify {out}"
    assert made["plans"]["lm"]["kernels"] > 0
    for verb in (("run", out, "What?"), ("verify", out)):
        shell(*verb, code=1)
        assert f"was built for {HERE_RTX}/sm_89; this machine is tensorrt-rtx@" in shell.errors
    shell("build", export("llava", "fp16"), out, "--target", f"{HERE_RTX}/rtx-4090")
    assert "already built" not in shell.errors
    table = shell("inspect", out)
    assert "not verified" in table
    assert "attentions fused" in table


def test_what_cannot_be_built_says_why(export: Export, tmp_path: Path) -> None:
    bundle = export("llava", "fp16")
    for target, kind, words in (
        (f"{HERE_RTX}/sm_90", UnsupportedError, "no engines for sm_90"),
        ("tensorrt-rtx@1.2/sm_89", TargetMismatch, "needs tensorrt-rtx 1.2, here is 1"),
        ("jetson-agx-orin", TargetMismatch, "cannot be built on this machine"),
    ):
        with pytest.raises(kind, match=words):
            api.build_engine(bundle, tmp_path / "e", target=target)
        assert not (tmp_path / "e").exists()


def test_too_little_memory_is_told(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = builder.build

    def starved(name: str, job: builder.Job, folder: Path) -> object:
        return made(name, replace(job, workspace_bytes=1), folder)

    monkeypatch.setattr(builder, "build", starved)
    with pytest.raises(OutOfMemory, match="the builder ran out of memory"):
        build(export("llava", "fp16"), tmp_path / "e", "sm_89")
    assert not (tmp_path / "e").exists()


def test_a_plan_without_its_weights_is_refused(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile that leaves the image no size builds into a constant."""
    bundle = export("convllava", "fp16")
    sizes = shapes.of("encoder.convnext", Bundle.open(bundle).model, 64)
    nothing = {**sizes.profiles[0], "height": (33, 48, 63), "width": (33, 48, 63)}

    def of(component: str, model: object, context: int) -> object:
        return replace(sizes, profiles=(nothing,))

    monkeypatch.setattr(shapes, "of", of)
    with pytest.raises(BuildError, match="took the model for a constant"):
        build(bundle, tmp_path / "e", "sm_89")


def test_engine_json_is_read_back(export: Export, tmp_path: Path) -> None:
    engine = build(export("llava", "fp16"), tmp_path / "e", "sm_89")
    assert manifest.read(tmp_path / "e") == engine
    again = build(export("llava", "fp16"), tmp_path / "e", "sm_89")
    assert again == engine  # kept as it is


def test_the_runtime_says_why_a_plan_is_refused(export: Export, tmp_path: Path) -> None:
    """NVIDIA's own runtime, here without a card: of what it is asked, it can tell damage."""
    build(export("llava", "fp16"), tmp_path / "e", "sm_89")
    trt, file, compiled = RTX.load(), tmp_path / "e/merger.plan", tmp_path / "none"
    if device.architecture() is None:
        with pytest.raises(BuildError, match=r"cannot load merger\.plan: .*cudaError"):
            plans.read(trt, file, compiled)
    data = bytearray(file.read_bytes())
    data[:4] = b"xxxx"
    file.write_bytes(bytes(data))
    with pytest.raises(BuildError, match=r"cannot load merger\.plan: the file is damaged"):
        plans.read(trt, file, compiled)
