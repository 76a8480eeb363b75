"""Images and classes as batches, rows that stand for no image, towers by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgevlm.toolkit.errors import CheckpointError, ConfigError, DataError
from edgevlm.training.data.broken import BrokenSample
from edgevlm.training.data.image_samples import Picture, class_names, numbered, open_images
from edgevlm.training.feed import Chosen
from edgevlm.training.towers.data import Pictures, open_set, read_labels
from edgevlm.training.towers.files import published, save_tower
from edgevlm.training.towers.mlcd_loss import MlcdHead
from edgevlm.training.towers.models import PRESETS, open_tower
from edgevlm.training.towers.partial_fc import PartialFC
from edgevlm.training.towers.ranks import FILLER
from edgevlm.training.towers.tower import Tower
from tests.training.towers import runs as tower_runs
from tests.training.towers.test_tower import tiny


def test_classes_are_ordered_as_people_order_them() -> None:
    def named(*classes: str) -> list[Picture | BrokenSample]:
        return [Picture(name, Path(name), (name,)) for name in classes]

    assert class_names(named("10", "9", "b", "10")) == ["10", "9", "b"]
    assert class_names(named("10", "9", "2")) == ["2", "9", "10"]
    found, labels = numbered([*named("9", "2"), Picture("x", Path("x"))], ["2", "9"])
    assert labels.tolist() == [[1], [0], [-1]]
    assert isinstance(found[2], BrokenSample)


def test_lists_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    lines = ['{"image": "a.png", "label": [3, "x"]}', "", '{"image": "gone.png"}', "{", "[]"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    first, *others = open_images(tmp_path / "list.jsonl")
    assert isinstance(first, Picture) and first.classes == ("3", "x")
    kinds = [one.kind for one in others if isinstance(one, BrokenSample)]
    assert kinds == ["missing image", "broken JSON", "wrong structure"]
    for name, text in (("b.json", "{}"), ("c.json", "["), ("d.txt", "a.png")):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            open_images(tmp_path / name)


def test_batches_follow_from_seed_epoch_and_number_alone(tmp_path: Path) -> None:
    data = tower_runs.folder(tmp_path, each=2)
    (data / "colour-0/004.png").write_bytes(b"no picture")
    images = open_set([str(data)], None, None)
    made = Pictures(images, 28, 3, (0.4, 1.0), 7, least=2)
    alone = made[Chosen([5], 1)][0]["pixels"]
    batch, faults = made[Chosen([3, 1, 5], 1)]
    torch.testing.assert_close(batch["pixels"][-1:], alone[:1], rtol=0, atol=0)
    assert not alone[1].any()  # a blank one, for batch norms
    assert [fault.kind for fault in faults] == ["image that cannot be decoded"]
    assert batch["places"].tolist() == [0, 2]
    assert batch["labels"].tolist() == [[1], [2], [FILLER]]
    assert not torch.equal(alone[0], made[Chosen([5], 2)][0]["pixels"][0])
    plain = made[Chosen([5])][0]["pixels"][0]
    torch.testing.assert_close(plain, made[Chosen([5])][0]["pixels"][0], rtol=0, atol=0)
    assert made[Chosen([], 1)][0]["images"] == 0


def test_rows_without_an_image_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 16, generator=generator)
    labels = torch.tensor([[3, 9], [1, -1], [2, 2], [0, 8], [4, 5]])
    for head in (MlcdHead(12, 16, sample_rate=1.0), PartialFC(12, 16)):
        own = labels if isinstance(head, MlcdHead) else labels[:, 0]
        padded = torch.cat([own, torch.full_like(own[:2], FILLER)])
        rows = torch.cat([x, torch.zeros(2, 16)]).requires_grad_()
        loss = head(rows, padded)
        torch.testing.assert_close(loss, head(x, own))
        torch.autograd.backward(loss)
        assert rows.grad is not None and not rows.grad[5:].any()
        assert head(rows, torch.full_like(padded, FILLER)).item() == 0


def test_label_files(tmp_path: Path) -> None:
    path = tmp_path / "labels.npy"
    np.save(path, np.array([4, -1, 0], np.int32))
    assert read_labels(path, 3, "data").tolist() == [[4], [-1], [0]]
    for array, named in (
        (np.zeros((3, 2)), "float64"),
        (np.full((3, 1), -2), "the label -2"),
        (np.zeros((4, 1), np.int32), "labels of 4 images"),
    ):
        np.save(path, array)
        with pytest.raises(DataError, match=named):
            read_labels(path, 3, "data")


@pytest.mark.parametrize("kind", ["clip", "mlcd", "unicom"])
def test_towers_are_opened_by_folder_file_and_name(kind: str, tmp_path: Path) -> None:
    tower = Tower(kind, tiny(kind), seed=4)
    save_tower(tower, tmp_path / "saved")
    found = open_tower(str(tmp_path / "saved"))
    for name, tensor in tower.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    side = 2 * found.config.pixels[0]
    assert open_tower(str(tmp_path / "saved"), image_size=side).config.pixels == (side, side)
    fresh = open_tower(f"random:{kind}={tmp_path / 'saved/config.json'}", seed=4)
    assert fresh.config == found.config
    assert torch.equal(fresh.get_parameter("patch.weight"), tower.get_parameter("patch.weight"))


def test_a_file_of_unicom_states_its_sizes(tmp_path: Path) -> None:
    path = tower_runs.unicom_file(tmp_path / "ViT.pt")
    assert open_tower(str(path)).config == tower_runs.UNICOM
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="64 channels, and does not say how many heads"):
        open_tower(str(path))
    small = Tower("unicom", tiny("unicom"))
    torch.save(published(small), path)
    with pytest.raises(ConfigError, match="does not say how many heads"):
        open_tower(str(path))
    described = {"model_type": "unicom", **vars(small.config)}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert open_tower(str(path)).config == small.config
    torch.save({"weight": torch.zeros(2)}, path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is no UNICOM"):
        open_tower(str(path))
    with pytest.raises(ConfigError, match="there is no tower random:clip") as odd:
        open_tower("random:clip")
    assert all(name in odd.value.hint for name in PRESETS)
