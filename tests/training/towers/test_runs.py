"""Whole runs of `edgevlm train` for vision towers: with clusters, resumed, split, refused."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm import api
from edgevlm.toolkit.errors import ConfigError, DataError, OutputError
from edgevlm.training.run import Result
from edgevlm.training.towers import labels as tower_labels
from edgevlm.training.towers.models import open_tower
from tests.training import runs
from tests.training.towers import runs as tower_runs


def train(stage: str, model: Path | str, data: Path, out: Path, **options: Any) -> Result:
    """A quick run in this process."""
    quick: dict[str, Any] = {
        "batch": 8, "rate": 1e-3, "log_every": 1, "steps": 3, "image_size": 28,
    }  # fmt: skip
    return api.train(stage, str(model), out, data=[str(data)], **{**quick, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tower_runs.folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tower_runs.clip_tower(tmp_path_factory.mktemp("tower") / "clip")


@pytest.fixture(scope="module")
def unicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tower_runs.unicom_file(tmp_path_factory.mktemp("tower") / "ViT.pt")


def test_mlcd_learns_the_clusters_of_its_own_embeddings(tower: Path, tmp_path: Path) -> None:
    data = tower_runs.folder(tmp_path / "flat", flat=True)
    held = tower_runs.folder(tmp_path / "held", each=3, seed=9, flat=True)
    out = tmp_path / "out"
    more = ("--classes", "6", "--positives", "2", "--sample-rate", "0.5", "--steps", "40")
    words = tower_runs.arguments("mlcd-tower", tower, data, out, *more, "--scale", "16")
    words += ["--class-rate", "10", "--eval-data", str(held), "--json", "--workers", "1"]
    result = json.loads(runs.finish(runs.start(*words)))
    assert (result["tower"], result["steps"], result["samples"]) == ("clip", 40, 320)
    assert result["last_loss"] < 0.6 * result["first_loss"]
    assert result["eval_image_accuracy"] > 0.8
    assert result["eval_token_accuracy"] is None
    labels = np.load(out / "clusters/labels.npy")
    assert labels.shape == (32, 2) and set(labels.ravel()) <= set(range(6))
    assert np.load(out / "clusters/held-out.npy").shape == (12, 2)
    assert "images_per_s" in tower_runs.lines(out)[0]
    assert "image_accuracy" in tower_runs.lines(out, "eval")[-1]
    before, after = (open_tower(str(path)) for path in (tower, out))
    assert after.config == before.config
    for name, tensor in before.state_dict().items():
        assert not torch.equal(tensor, after.state_dict()[name]), name


def test_unicom_learns_classes_by_folder(unicom: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    held = tower_runs.folder(tmp_path / "held", each=3, seed=9)
    result = train(
        "unicom-sop", unicom, data, out, steps=40, eval_data=[str(held)], channels=16, ema=0.5
    )
    assert (result.tower, result.faults) == ("unicom", {})
    assert result.first_loss is not None and result.last_loss is not None
    assert result.last_loss < 0.6 * result.first_loss
    assert result.eval_image_accuracy is not None and result.eval_image_accuracy > 0.8
    again = train("unicom-sop", out, data, tmp_path / "again", steps=1)
    assert again.first_loss is not None and again.first_loss < result.first_loss
    described = json.loads((out / "training.json").read_text())
    assert (described["classes"], described["schedule"]) == (4, "one_cycle")
    assert described["loss"] == ["partial_fc", 32.0, 0.25, 1.0, 16]


@pytest.mark.parametrize("kind", ["clip", "unicom"])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    kind: str, tower: Path, unicom: Path, data: Path, tmp_path: Path
) -> None:
    """With classes, channels and depth drawn at random, and clusters made once."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options: dict[str, Any] = {"save_every": 3, "steps": 30, "micro_batch": 4, "sample_rate": 0.5}
    if kind == "clip":
        stage, model = "mlcd-tower", tower
        options |= {"classes": 8, "positives": 2}
    else:
        stage, model = "unicom-tower", unicom
        options |= {"channels": 12, "drop_path": 0.3}
    train(stage, model, data, whole, **options)
    words = tower_runs.arguments(stage, model, data, killed, *tower_runs.flags(options))
    runs.kill(12, *words)
    assert len(runs.losses(killed)) == 12  # three of which are done again
    assert not (killed / "config.json").exists()
    made = killed / "clusters/embeddings.npy"
    stamp = made.stat().st_mtime_ns if kind == "clip" else None
    train(stage, model, data, killed, resume=True, **options)
    assert runs.losses(killed) == runs.losses(whole)
    assert stamp is None or made.stat().st_mtime_ns == stamp
    towers = [open_tower(str(out)).state_dict() for out in (whole, killed)]
    for name, tensor in towers[0].items():
        assert torch.equal(tensor, towers[1][name]), name


def test_embeddings_are_not_made_again(
    tower: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"classes": 6, "positives": 2, "steps": 2}
    train("mlcd-tower", tower, data, tmp_path / "whole", **options)
    out = tmp_path / "out"

    def killed(*rest: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tower_labels, "cluster", killed)
        train("mlcd-tower", tower, data, out, **options)
    assert [path.name for path in (out / "clusters").iterdir()] == ["embeddings.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(tower_labels, "write_embeddings", killed)
        train("mlcd-tower", tower, data, out, resume=True, **options)
    assert runs.losses(out) == runs.losses(tmp_path / "whole")
    tower_runs.folder(data.parent / "more", each=9)
    with pytest.raises(ConfigError, match="is of another run: its data is"):
        train("mlcd-tower", tower, data.parent / "more", out, resume=True, **options)


@pytest.mark.parametrize("stage", ["mlcd-tower", "unicom-sop"])
def test_two_processes_give_the_losses_of_one(stage: str, tower: Path, tmp_path: Path) -> None:
    """Also with a broken image, which leaves one process a smaller batch; and one can go on."""
    data = tower_runs.folder(tmp_path / "data")
    (data / "colour-1/005.png").write_bytes(b"no picture")
    held = tower_runs.folder(tmp_path / "held", each=3, seed=9)
    options: dict[str, Any] = {"sample_rate": 1.0, "drop_path": 0.0, "steps": 6, "save_every": 3}
    options |= {"classes": 5, "positives": 2} if stage == "mlcd-tower" else {}
    options |= {"max_broken": 0.1, "micro_batch": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    line = tower_runs.arguments(stage, tower, data, two, *tower_runs.flags(options))
    process = runs.start(*line, "--eval-data", str(held), "-q", "--json", processes=2)
    options |= {"eval_data": [str(held)], "micro_batch": 4}
    alone = train(stage, tower, data, one, **options)
    found = json.loads(runs.finish(process))
    assert (found["processes"], alone.processes) == (2, 1)
    for key in ("samples", "eval_image_accuracy", "faults"):
        assert found[key] == getattr(alone, key), key
    assert found["eval_loss"] == pytest.approx(alone.eval_loss, rel=1e-4)
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-4)
    norms = [[line["gradient_norm"] for line in tower_runs.lines(out)] for out in (two, one)]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-3)
    towers = [open_tower(str(out)).state_dict() for out in (one, two)]
    for name, tensor in towers[0].items():
        if not name.endswith("attention.k.bias"):  # its gradient is 0 but for rounding
            torch.testing.assert_close(tensor, towers[1][name], atol=2e-4, rtol=1e-3, msg=name)
    last = two / "states/step-000006"
    assert len(list(last.glob("classes-*"))) == 2
    shutil.rmtree(last)
    train(stage, tower, data, two, resume=True, **options)
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-4)


def test_broken_images_are_counted_and_named(tower: Path, tmp_path: Path) -> None:
    data = tower_runs.folder(tmp_path / "data")
    (data / "colour-1/005.png").write_bytes(b"no picture")
    (data / "stray.png").write_bytes((data / "colour-0/000.png").read_bytes())
    with pytest.raises(DataError, match="of 33 samples are broken, more than 1 %") as many:
        train("unicom-sop", tower, data, tmp_path / "none", drop_path=0.0)
    assert "stray.png" in many.value.message and "--max-broken" in many.value.hint
    result = train(
        "unicom-sop", tower, data, tmp_path / "out", drop_path=0.0, max_broken=0.1, steps=8
    )
    assert result.faults == {"image without a class": 1, "image that cannot be decoded": 1}
    assert [line["faults"] for line in tower_runs.lines(tmp_path / "out")][-1] == 2
    assert result.samples == 62  # of 64 places, the broken one was met twice


def test_lists_and_shards_are_the_folder(tower: Path, data: Path, tmp_path: Path) -> None:
    files = sorted(data.rglob("*.png"))
    rows = [{"image": str(path.relative_to(data)), "label": path.parent.name} for path in files]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = "".join(f"{row['image']},{row['label']}\n" for row in rows)
    (tmp_path / "b.csv").write_text("image,label\n" + table)
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for number, (path, row) in enumerate(zip(files, rows, strict=True)):
            tar.add(path, f"{number:03d}.png")
            (tmp_path / "label").write_text(row["label"])
            tar.add(tmp_path / "label", f"{number:03d}.cls")
    train("unicom-sop", tower, data, tmp_path / "folder", drop_path=0.0)
    for name in ("a.jsonl", "b.csv", "c.tar"):
        out = tmp_path / name.replace(".", "-")
        train("unicom-sop", tower, tmp_path / name, out, drop_path=0.0, images=str(data))
        assert runs.losses(out) == runs.losses(tmp_path / "folder"), name


def test_a_label_file_and_random_weights(data: Path, tower: Path, tmp_path: Path) -> None:
    labels = np.stack([np.arange(32) % 5, np.arange(32) % 3, np.full(32, -1)], 1)
    np.save(tmp_path / "labels.npy", labels.astype(np.int32))
    config = tower / "config.json"
    result = train(
        "mlcd-tower",
        f"random:clip={config}",
        data,
        tmp_path / "out",
        labels=str(tmp_path / "labels.npy"),
        precision="bf16",
        clip=0.5,
    )
    assert result.samples == 24
    assert json.loads((tmp_path / "out/training.json").read_text())["classes"] == 5
    assert open_tower("random:unicom-b32").channels == 512


@pytest.mark.parametrize(
    ("stage", "options", "named"),
    [
        ("mlcd-tower", {"image_size": None}, "images of 28 pixels, mlcd-tower those of 224"),
        ("mlcd-tower", {"classes": 40, "positives": 2}, "32 images cannot be put into 40"),
        ("mlcd-tower", {"classes": 4}, "8 classes an image, but there are 4 clusters"),
        ("mlcd-tower", {"classes": 4, "labels": "x.npy"}, "contradict one another"),
        ("mlcd-tower", {"labels": "x.npy"}, "x.npy holds no labels"),
        ("mlcd-tower", {"lora": 4}, "--lora is not for mlcd-tower"),
        ("mlcd-tower", {"precision": "fp16"}, "fp16 is not implemented"),
        ("mlcd-tower", {"random_weights": True}, "--random-weights is not for"),
        ("mlcd-tower", {"sample_rate": 0.0}, "sample_rate = 0.0"),
        ("unicom-sop", {}, "clip has no stochastic depth"),
        ("unicom-sop", {"positives": 2}, "takes one class an image"),
        ("unicom-sop", {"drop_path": 0.0, "batch": 9, "micro_batch": 4}, "cannot be dealt"),
        ("unicom-spo", {}, "there is no training stage 'unicom-spo'"),
        ("llava-finetune", {"classes": 4}, "--classes is for stages of vision towers"),
    ],
)
def test_what_is_refused_before_anything_is_written(
    stage: str, options: dict[str, Any], named: str, tower: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=named):
        train(stage, tower, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_fit_are_refused(tower: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flat = tower_runs.folder(tmp_path / "flat", each=2, flat=True)
    with pytest.raises(DataError, match="does not say of which class"):
        train("mlcd-tower", tower, flat, out)
    with pytest.raises(DataError, match="nowhere does not exist"):
        train("mlcd-tower", tower, tmp_path / "nowhere", out)
    np.save(tmp_path / "labels.npy", np.zeros((5, 1), np.int32))
    with pytest.raises(DataError, match="has labels of 5 images, .* holds 8"):
        train("mlcd-tower", tower, flat, out, labels=str(tmp_path / "labels.npy"))
    other = tower_runs.folder(tmp_path / "other", each=1)
    (other / "colour-0").rename(other / "violet")
    with pytest.raises(DataError, match="of class 'violet', which is not among"):
        train("mlcd-tower", tower, data, out, eval_data=[str(other)])
    with pytest.raises(OutputError, match="holds no run to resume"):
        train("mlcd-tower", tower, data, out, resume=True)
    assert not out.exists()
    train("mlcd-tower", tower, data, out)
    with pytest.raises(ConfigError, match="is of another run: its class_rate is 1.0, now 3.0"):
        train("mlcd-tower", tower, data, out, class_rate=3.0, resume=True)


def test_all_stages_are_listed() -> None:
    listed = json.loads(runs.finish(runs.start("train", "list", "--json")))
    stages = {row["name"]: row for row in listed}
    assert stages["mlcd-tower"]["batch"] == 32768
    assert stages["llava-finetune"]["systems"] == ["llava"]
    printed = runs.finish(runs.start("train", "list"))
    assert all(name in printed and row["purpose"] in printed for name, row in stages.items())
