"""build's own options: fewer tiles, the first op that differs, layers that stay in float."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from edgevlm import api
from edgevlm.engines.build import tune
from edgevlm.engines.build.build import Request, build
from edgevlm.engines.lowering import lower, rewrites
from edgevlm.engines.lowering.graph import Rewriter
from edgevlm.engines.lowering.onnxruntime_rows import ROWS
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.toolkit.errors import AccuracyError, ConfigError, OutputError
from edgevlm.toolkit.quantization.plan import Precision
from edgevlm.toolkit.target import this_cpu
from tests.conftest import HERE
from tests.pipeline import LOSS_IN_4_BITS, engine_of, silent

TILED = HERE / "goldens/mlcd_llavanext_e2e"
PLAIN = HERE / "goldens/e2e_llava15"


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a system with tiles."""
    work = tmp_path_factory.mktemp("tiled")
    engine_of(TILED, work)
    return work / "bundle"


def request(tiles: int | None = None, *, bisect: bool = False, force: bool = False) -> Request:
    return Request(this_cpu(), None, force, "tests", tiles, bisect)


def test_fewer_tiles_make_shorter_prompts(tiled: Path, tmp_path: Path) -> None:
    counts = {}
    for tiles in (None, 2):
        engine = tmp_path / f"engine-{tiles}"
        made, _ = build(tiled, engine, request(tiles), silent)
        assert made.max_image_tiles == tiles
        session = Session.open(engine)
        answer = session.answer(Question("What?", [TILED / "image0.png"], 1))
        counts[tiles] = answer.image_tokens
        rules = session.model.images.tiling
        assert rules is not None
        most = max((w // rules.tile) * (h // rules.tile) for w, h in rules.pinpoints)
        assert tiles is None or most <= tiles
    assert 0 < counts[2] < counts[None]


def test_another_number_of_tiles_is_another_engine(tiled: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    build(tiled, engine, request(2), silent)
    assert build(tiled, engine, request(2), silent)[1] is False
    assert build(tiled, engine, request(force=True), silent)[1] is True
    made, worked = build(tiled, engine, request(2, force=True), silent)
    assert worked
    assert "--max-image-tiles 2" in made.rebuild_command(engine)
    assert f"--max-context {made.context}" in made.rebuild_command(engine)


def test_tiles_that_cannot_be_are_refused(tiled: Path, tmp_path: Path) -> None:
    smallest = json.loads((TILED / "config.json").read_text())["image_grid_pinpoints"]
    side = min(min(pair) for pair in smallest)
    fewest = min((w // side) * (h // side) for w, h in smallest)
    with pytest.raises(ConfigError, match=f"smallest resolution takes {fewest}"):
        build(tiled, tmp_path / "e", request(fewest - 1), silent)
    engine_of(PLAIN / "llava-v1.5-tiny", tmp_path)
    with pytest.raises(ConfigError, match="no effect"):
        build(tmp_path / "bundle", tmp_path / "e", request(2), silent)
    assert not (tmp_path / "e").exists()


def test_every_component_is_lowered_once(
    tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {"load": [], "lower": []}
    load, lower_component = onnx.load, lower.lower_component

    def loaded(path: str, **options: Any) -> onnx.ModelProto:
        seen["load"].append(Path(path).stem)
        return load(path, **options)

    def lowered(component: str, *rest: Any) -> lower.Lowered:
        seen["lower"].append(component)
        return lower_component(component, *rest)

    monkeypatch.setattr(onnx, "load", loaded)
    monkeypatch.setattr(lower, "lower_component", lowered)
    made, _ = build(tiled, tmp_path / "e", request(), silent)
    names = [record.name for record in made.components]
    assert seen == {"load": names, "lower": names}
    assert {d.component for d in made.lowering} == set(names)


def _wrong(node: onnx.NodeProto, r: Rewriter) -> list[onnx.NodeProto]:
    """quick_gelu with another slope."""
    (made,) = rewrites.quick_gelu(node, r)
    made.attribute[0].f = 1.9
    return [made]


@pytest.mark.parametrize("bisect", [False, True])
def test_an_engine_that_diverges_is_not_written(
    bisect: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_of(PLAIN / "llava-v1.5-tiny", tmp_path)
    row = replace(ROWS["edgevlm.QuickGelu"], rewrite=_wrong)
    monkeypatch.setitem(ROWS, "edgevlm.QuickGelu", row)
    with pytest.raises(AccuracyError, match=r"encoder\.clip differs") as caught:
        build(tmp_path / "bundle", tmp_path / "wrong", request(bisect=bisect), silent)
    assert not (tmp_path / "wrong").exists()
    if bisect:
        assert "layers.0/mlp/" in caught.value.message
        assert "made by com.microsoft.QuickGelu" in caught.value.message
    else:
        assert "--bisect" in caught.value.hint


# -- layers that stay in float -------------------------------------------------------------------


def test_what_is_kept_in_float_loses_nothing(ready: Path, tmp_path: Path) -> None:
    """The language model here: its loss is none, while the encoder has one."""
    made = api.build_engine(
        ready / "bundle", tmp_path / "e", precision="int8-rows", keep_float=["lm/*"]
    )
    assert made.build.precision_losses["encoder.clip"] > 1e-3
    assert made.build.precision_losses["lm"] < 1e-4
    assert {made.plan.at(f"lm/{name}") for name in ("embed", "layers.0/mlp/up")} == {"float"}
    assert made.plan.at("encoder.clip/layers.0/mlp/fc1") == "int8_rows"
    assert "--keep-float 'lm/*'" in made.rebuild_command(tmp_path / "e")


def test_single_layers_can_be_kept(ready: Path, tmp_path: Path) -> None:
    """A linear of a layer whose others are rounded; an engine without it is another one."""
    losses = []
    for globs in ((), ("lm/*/mlp/*", "lm/layers.0/attention/v")):
        made = api.build_engine(
            ready / "bundle", tmp_path / "e", precision="int8-rows", keep_float=globs, force=True
        )
        losses.append(made.build.precision_losses["lm"])
        again = api.build_engine(
            ready / "bundle", tmp_path / "e", precision="int8-rows", keep_float=globs
        )
        assert again == made  # it was kept
    assert losses[1] < losses[0]
    with pytest.raises(OutputError):
        api.build_engine(ready / "bundle", tmp_path / "e", precision="int8-rows")


def test_prompts_keep_them_in_their_own_form_too(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: dict[str, Precision] = {
        "encoder.clip": "int8_rows",
        "merger": "int8_rows",
        "lm": "int4_weights",
    }
    monkeypatch.setattr(
        tune, "tuned", lambda *given, **options: tune.Choice(forms, prompts="int8_rows")
    )
    made = api.build_engine(
        ready / "bundle",
        tmp_path / "e",
        precision="int4",
        keep_float=["lm/layers.1/*"],
        accept_loss=LOSS_IN_4_BITS,
    )
    assert made.prompt_form is not None
    for plan in (made.plan, made.prompt_form.plan):
        assert plan.at("lm/layers.1/mlp/up") == "float"
        assert plan.at("lm/layers.0/mlp/up") != "float"


@pytest.mark.parametrize(
    ("precision", "glob", "message"),
    [
        ("int8-rows", "lm/layer.0/*", "matches no layer that would be rounded"),
        ("int8-rows", "lm/layers.0/norm1", "matches no layer that would be rounded"),
        (None, "lm/*", "no weight is rounded"),
    ],
)
def test_globs_without_an_effect_are_refused(
    precision: str | None, glob: str, message: str, ready: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        api.build_engine(ready / "bundle", tmp_path / "e", precision=precision, keep_float=[glob])
    assert glob in caught.value.message
    assert not (tmp_path / "e").exists()
