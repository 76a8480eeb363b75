"""Whole runs of `edgevlm train`: resumed, on several processes, refused, with broken data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm import api
from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.errors import ConfigError, DataError, OutputError
from edgevlm.training.loop import StepRecord
from edgevlm.training.report import Report
from edgevlm.training.run import Result
from tests.conftest import ROOT
from tests.training import runs


def train(data: Path, out: Path, **options: Any) -> Result:
    """A quick run in this process."""
    quick: dict[str, Any] = {"batch": 8, "micro_batch": 4, "rate": 1e-3, "log_every": 1, "steps": 3}
    return api.train(
        options.pop("stage", runs.STAGE),
        str(options.pop("model", runs.checkpoint())),
        out,
        data=[str(data)],
        **{**quick, **options},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.data_set(tmp_path_factory.mktemp("data"))


def test_a_model_learns_and_its_engine_says_so(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held_out = {"eval_data": [str(data)], "eval_every": 5}
    result = train(data, out, steps=25, rate=3e-3, epochs=None, **held_out)
    assert result.first_loss is not None and result.last_loss is not None
    assert result.first_loss > 5 > 0.2 > result.last_loss
    assert result.eval_token_accuracy is not None and result.eval_token_accuracy > 0.95
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    assert evaluated == [5, 10, 15, 20, 25]  # each once, the last step too
    assert result.trained_parameters < result.parameters  # the tower is frozen
    before, after = (systems.load(p, Options()) for p in (runs.checkpoint(), out))
    assert after.model.encoders == before.model.encoders
    for component, weights in after.weights.items():
        same = [np.array_equal(weights[key], before.weights[component][key]) for key in weights]
        assert all(same) if component.startswith("encoder.") else not any(same), component
    api.export_bundle(out, tmp_path / "bundle")
    api.build_engine(tmp_path / "bundle", tmp_path / "engine")
    with Session.open(tmp_path / "engine") as session:
        for number in range(3):
            image = str(data.parent / f"{number}.png")
            answer = session.answer(Question("What is it?", [image], 8))
            assert answer.text == runs.COLOURS[number]


def test_a_killed_run_goes_on_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = ("--steps", "30", "--save-every", "3", "--ema", "0.9", "--lora", "4", "-q")
    runs.finish(runs.start(*runs.arguments(data, whole, *steps)))
    runs.kill(12, *runs.arguments(data, killed, *steps))
    assert len(runs.losses(killed)) == 12  # three of which are done again
    assert not (killed / "checkpoint.json").exists()
    runs.finish(runs.start(*runs.arguments(data, killed, *steps, "--resume")))
    assert runs.losses(killed) == runs.losses(whole)
    tensors = [systems.load(path, Options()).weights["lm"] for path in (whole, killed)]
    for key in tensors[0]:
        assert np.array_equal(tensors[0][key], tensors[1][key]), key
    states = sorted(path.name for path in (killed / "states").iterdir())
    assert states == ["step-000027", "step-000030"]


def test_two_processes_give_the_losses_of_one(data: Path, tmp_path: Path) -> None:
    words = ("--steps", "6", "-q", "--json")
    runs.finish(runs.start(*runs.arguments(data, tmp_path / "one", *words)))
    published = ("--original", str(tmp_path / "published"))
    two_words = runs.arguments(data, tmp_path / "two", *words, *published)
    printed = runs.finish(runs.start(*two_words, processes=2))
    result = json.loads(printed)  # one object: the first process alone prints
    assert (result["processes"], result["distribution"]) == (2, "MULTI_CPU")
    one, two = runs.losses(tmp_path / "one"), runs.losses(tmp_path / "two")
    np.testing.assert_allclose(one, two, rtol=1e-4)
    found, expected = (
        systems.load(tmp_path / name, Options()).weights["merger"] for name in ("two", "one")
    )
    restored = systems.load(tmp_path / "published", Options()).weights["merger"]
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], atol=2e-4)
        assert np.array_equal(restored[key], found[key]), key


def test_a_sharded_model_takes_the_steps_of_a_plain_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.training.sharded"]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout


def test_adapters_leave_the_rest_alone_and_are_merged(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "out", lora=4, lora_on="lm.layers.*.attention.[qv].weight")
    before, after = (systems.load(p, Options()) for p in (runs.checkpoint(), tmp_path / "out"))
    changed = {
        key
        for key, array in after.weights["lm"].items()
        if not np.array_equal(array, before.weights["lm"][key])
    }
    layers = after.model.lm.config.num_layers
    wanted = {f"layers.{i}.attention.{m}.weight" for i in range(layers) for m in "qv"}
    assert changed == wanted
    for key in changed:
        update = after.weights["lm"][key] - before.weights["lm"][key]
        assert np.linalg.matrix_rank(update, tol=1e-6) <= 4


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"ema": 0.5}, {"compile": False}])
def test_other_ways_of_computing_learn_too(
    data: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    result = train(data, tmp_path / "out", steps=8, **options)
    assert result.last_loss is not None and result.first_loss is not None
    assert result.last_loss < 0.7 * result.first_loss


def test_what_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="stage mmfuser-finetune is for mmfuser"):
        train(data, out, stage="mmfuser-finetune")
    with pytest.raises(ConfigError, match="there is no training stage 'llava-fintune'") as odd:
        train(data, out, stage="llava-fintune")
    assert "llava-finetune" in odd.value.hint
    with pytest.raises(ConfigError, match="cannot be dealt to 1 process"):
        train(data, out, batch=7, micro_batch=2)
    with pytest.raises(ConfigError, match="trains merger.nothing"):
        train(data, out, train=["merger.nothing.*"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        train(data, out, freeze=["*"])
    with pytest.raises(OutputError, match="holds no run to resume"):
        train(data, out, resume=True)
    with pytest.raises(DataError, match=r"nowhere.json does not exist"):
        train(tmp_path / "nowhere.json", out)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        train(data, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_run_of_another_kind_is_not_resumed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(data, out, save_every=2)
    state = (out / "states/step-000002/run.json").read_bytes()
    with pytest.raises(ConfigError, match="is of another run: its rate is 0.001, now 0.002"):
        train(data, out, resume=True, rate=2e-3)
    other = tmp_path / "other"
    shutil.copytree(runs.checkpoint(), other)
    shutil.copytree(runs.checkpoint().parent / "clip-vit-tiny", tmp_path / "clip-vit-tiny")
    with pytest.raises(ConfigError, match="is of another run: its model is"):
        train(data, out, resume=True, model=other)
    with pytest.raises(OutputError, match="exists"):
        train(data, out)
    assert (out / "states/step-000002/run.json").read_bytes() == state


def test_broken_samples_are_counted_and_named(tmp_path: Path) -> None:
    path = runs.data_set(tmp_path / "data", 40)
    items = json.loads(path.read_text())
    items[0]["image"] = "gone.png"
    items[1]["conversations"][1]["value"] = "  "
    items[2]["conversations"][0]["value"] = "<image>\n<image>\nWhat?"
    (path.parent / "3.png").write_bytes(b"no picture")
    items[4]["conversations"][0]["value"] = "<image>\n" + "long " * 3000
    path.write_text(json.dumps(items))
    with pytest.raises(DataError, match="of 40 samples are broken, more than 1 %") as many:
        train(path, tmp_path / "none")
    assert "--max-broken" in many.value.hint
    result = train(path, tmp_path / "out", steps=10, max_broken=0.2)
    assert result.faults == {
        "missing image": 1,
        "empty answer": 1,
        "number of <image> differs from that of images": 1,
        "image that cannot be decoded": 1,
        "answer beyond the context": 1,
    }
    lines = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert [line["faults"] for line in lines][-1] == 5
    assert result.samples < 80  # each broken one made its batch smaller


def test_options_from_a_file_are_the_flags(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {data}\nrate: 1e-3\nsteps: 2\nbatch: 8\nlog-every: 1\n")
    words = ["train", runs.STAGE, "--model", str(runs.checkpoint()), "--config", str(file)]
    runs.finish(runs.start(*words, "-o", str(tmp_path / "a"), "-q"))
    runs.finish(runs.start(*runs.arguments(data, tmp_path / "b", "--steps", "2", "-q")))
    np.testing.assert_allclose(runs.losses(tmp_path / "a"), runs.losses(tmp_path / "b"), rtol=1e-5)
    file.write_text("data: x\nrates: 1\n")
    failed = runs.start(*words, "-o", str(tmp_path / "c"))
    _, err = failed.communicate()
    assert failed.returncode == 1
    assert err.startswith("error:") and "rates is no option of training" in err


def test_the_same_weights_come_out_in_any_number_type(data: Path, tmp_path: Path) -> None:
    for dtype in ("fp32", "fp16"):
        train(data, tmp_path / dtype, dtype=dtype, steps=1)
    wide, narrow = (systems.load(tmp_path / d, Options()).weights["lm"] for d in ("fp32", "fp16"))
    for key in wide:
        assert np.array_equal(wide[key].astype(np.float16), narrow[key].astype(np.float16)), key
    assert not torch.is_inference_mode_enabled()


def test_the_time_that_is_left_counts_the_steps_of_this_call(tmp_path: Path) -> None:
    said: list[str] = []
    report = Report(tmp_path, 75, said.append, begun=40, quiet=True, tensorboard=False)
    report.step(StepRecord(45, 75, 1.0, 1e-3, 1.0, 0, 0, 100.0, 25.0, 0))
    report.close()
    assert said == ["step 45/75  loss 1.0000  100 tokens/s  2:30 left"]
