"""Every published stage, one after the other, on tiny models: what changes is what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import api
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options, Source
from edgevlm.toolkit.errors import ConfigError
from edgevlm.training import setup, stages
from edgevlm.training.assemble import assemble
from edgevlm.training.optimizer import applied, factor, groups
from edgevlm.training.options import TrainOptions
from edgevlm.training.vlm import VLM
from tests.conftest import ROOT
from tests.training import runs, test_assemble

# The stages of each system in order, and the globs of what each may change.
CHAINS: Mapping[str, list[tuple[str, list[str]]]] = {
    "llava": [
        ("llava-pretrain", ["merger.*"]),
        ("llava-finetune", ["merger.*", "lm.*"]),
    ],
    "llava_next": [
        ("next-pretrain", ["merger.linears.*"]),
        ("next-finetune", ["merger.*", "lm.*", "encoder.*"]),
    ],
    "mlcd": [
        ("next-pretrain", ["merger.linears.*"]),
        ("next-finetune", ["merger.*", "lm.*", "encoder.*"]),
        ("next-onevision", ["merger.*", "lm.*", "encoder.*"]),
    ],
    "convllava": [
        ("convllava-projector", ["merger.*", "encoder.convnext.stages.4.*", "lm.head.*"]),
        (
            "convllava-pretrain",
            [
                "merger.*",
                "lm.*",
                "encoder.convnext.stages.2.*",
                "encoder.convnext.stages.3.*",
                "encoder.convnext.stages.4.*",
            ],
        ),
        ("convllava-finetune", ["merger.*", "lm.*"]),
    ],
    "mmfuser": [
        ("mmfuser-pretrain", ["merger.*"]),
        ("mmfuser-finetune", ["merger.*", "lm.*"]),
    ],
    "comm": [
        ("comm-pretrain", ["merger.*", "lm.*"]),
        ("comm-finetune", ["merger.*", "lm.*"]),
    ],
}


def beginning(system: str, work: Path) -> dict[str, Any]:
    """What the first stage is told about the new model."""
    source = test_assemble.made(system, work)
    facts = source.origin["assembled"]
    towers = [f"{kind}={folder}" for kind, folder in facts["towers"].items()]
    more = {"image_size": 128} if system == "convllava" else {}
    return {"model": facts["language_model"], "towers": towers, "system": system, **more}


def tensors(source: Source) -> dict[str, Any]:
    return {f"{c}.{key}": array for c, w in source.weights.items() for key, array in w.items()}


@pytest.mark.parametrize("system", CHAINS)
def test_each_stage_changes_what_it_trains(system: str, tmp_path: Path) -> None:
    data = runs.data_set(tmp_path / "data", 10)
    begun: dict[str, Any] = beginning(system, tmp_path)
    before: dict[str, Any] = {}
    quick: dict[str, Any] = {
        "batch": 4,
        "micro_batch": 2,
        "steps": 2,
        "log_every": 1,
        "warmup": 0.0,
    }
    for number, (stage, globs) in enumerate(CHAINS[system]):
        out = tmp_path / stage
        stated = stages.find_vlm(stage)
        if stated.fifth_stage:
            monkey = replace(stated, fifth_stage=(1, 64))
            stages_of = tuple(monkey if s.name == stage else s for s in stages.STAGES)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stages, "STAGES", stages_of)
                result = api.train(stage, out=out, data=[str(data)], **begun, **quick)
        else:
            captions: dict[str, Any] = {"max_broken": 0.3} if stated.text == "plain" else {}
            result = api.train(stage, out=out, data=[str(data)], **begun, **quick, **captions)
        assert result.last_loss is not None and np.isfinite(result.last_loss)
        after = tensors(systems.load(out, Options()))
        if number:
            changed = {k for k in after if not np.array_equal(after[k], before[k])}
            allowed = {k for k in after if any(fnmatchcase(k, glob) for glob in globs)}
            assert changed <= allowed, sorted(changed - allowed)[:3]
            for glob in globs:  # every part of the model is reached
                assert any(fnmatchcase(key, glob) for key in changed), glob
        before, begun = after, {"model": str(out)}
    api.export_bundle(tmp_path / CHAINS[system][-1][0], tmp_path / "bundle")


def test_frozen_parts_of_first_stages_stay_as_they_were(tmp_path: Path) -> None:
    """The first stage against the assembled model, whose merger has a seed of its own."""
    begun = beginning("llava_next", tmp_path)
    data = runs.data_set(tmp_path / "data", 10)
    api.train(
        "next-pretrain", out=tmp_path / "out", data=[str(data)], steps=1, batch=2, warmup=0.0,
        max_broken=0.3, **begun,
    )  # fmt: skip
    towers = dict(text.split("=", 1) for text in begun["towers"])
    new = assemble("llava_next", Path(begun["model"]), {k: Path(v) for k, v in towers.items()})
    after, before = tensors(systems.load(tmp_path / "out", Options())), tensors(new)
    changed = {key for key in after if not np.array_equal(after[key], before[key])}
    assert changed == {key for key in after if key.startswith("merger.linears.")}


def test_published_rates_reach_their_parts(tmp_path: Path) -> None:
    source = test_assemble.made("mlcd", tmp_path)
    stage = stages.find_vlm("next-finetune")
    model = setup.model(source, stage, TrainOptions(), None)
    found = {group["lr"]: len(group["params"]) for group in groups(model, stage)}
    assert set(found) == {1e-5, 2e-6}
    encoder = sum(1 for name, _ in model.named_parameters() if name.startswith("encoder."))
    slow = [g for g in groups(model, stage) if g["lr"] == 2e-6]
    assert sum(len(group["params"]) for group in slow) == encoder


def test_options_replace_what_a_stage_says() -> None:
    options = TrainOptions(rate=5e-4, train=("encoder.*=1e-6", "lm.norm.*"), freeze=("merger.*",))
    stage = applied(stages.find_vlm("llava-pretrain"), options)
    assert stage.rate_of("encoder.clip.patch.weight") == 1e-6
    assert stage.rate_of("lm.norm.weight") == 5e-4
    assert stage.rate_of("merger.linears.0.weight") is None
    assert stage.rate_of("lm.head.weight") is None
    with pytest.raises(ConfigError, match="'fast' is no learning rate"):
        applied(stage, TrainOptions(train=("lm.*=fast",)))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rates_rise_and_fall_as_transformers_let_them(schedule: Any) -> None:
    import torch
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    of: dict[str, Any] = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }
    expected = of[schedule](optimizer, 4, 20)
    for step in range(20):
        found = factor(step, 20, 4, schedule)
        assert found == pytest.approx(expected.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        expected.step()


def test_every_stage_names_a_known_system_and_its_page() -> None:
    page = (ROOT / "docs/training.md").read_text()
    known = set(systems.names())
    assert len({stage.name for stage in stages.STAGES}) == len(stages.STAGES)
    for stage in stages.STAGES:
        assert set(stage.systems) <= known
        assert f"`{stage.name}`" in page, stage.name


def test_a_model_of_every_system_takes_a_stage_of_its_own(tmp_path: Path) -> None:
    for system in CHAINS:
        source = test_assemble.made(system, tmp_path / system)
        fitting = [s for s in stages.STAGES if system in s.systems]
        assert fitting, system
        for stage in fitting:
            if stage.fifth_stage is None and "stages" not in str(stage.trained):
                stages.matches_something(
                    stage, [name for name, _ in VLM(source.model).named_parameters()]
                )
