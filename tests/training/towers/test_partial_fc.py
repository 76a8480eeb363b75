"""PartialFC on one process and on two against the original's losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from edgevlm.toolkit import models
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.training.processes import leave
from edgevlm.training.towers.class_matrix import load_classes, save_classes
from edgevlm.training.towers.mlcd_loss import MlcdHead, mlcd_loss
from edgevlm.training.towers.partial_fc import Margin, PartialFC, margin_logits, sample_classes
from edgevlm.training.towers.parts import step
from edgevlm.training.towers.ranks import share
from edgevlm.training.towers.tower import Tower
from tests.conftest import golden_case
from tests.training.towers.test_mlcd_loss import difference
from tests.training.towers.test_mlcd_loss import given as multi_label

VARIANTS = ["arc", "feat", "classfeat", "cos", "filt", "nonorm"]


def head_of(variant: str, inputs: Any) -> PartialFC:
    """The head as the golden's variant was made, with its centres."""
    centres = torch.from_numpy(inputs["centres"])
    margin = {
        "cos": Margin(cosine=float(inputs["cos_margin"])),
        "filt": Margin(filter_above=float(inputs["filter_threshold"])),
        "nonorm": Margin(scale=1.0),
    }.get(variant, Margin(float(inputs["scale"]), float(inputs["margin"])))
    head = PartialFC(30, 20, margin, normalise=variant != "nonorm")
    own = head.matrix.own
    with torch.no_grad():
        head.matrix.weight.copy_(centres[own.start : own.stop])
    return head


def index(inputs: Any, key: str) -> Tensor | None:
    return torch.from_numpy(inputs[key]) if key in inputs.files else None


def differences(golden: Path, variant: str) -> dict[str, float]:
    """Of loss and gradients, on one process."""
    inputs, outputs = np.load(golden / "inputs.npz"), np.load(golden / "outputs.npz")
    head = head_of(variant, inputs)
    features = torch.from_numpy(inputs["features"]).requires_grad_()
    loss = head(
        features,
        torch.from_numpy(inputs["labels"]),
        classes=index(inputs, f"{variant}.class_index"),
        channels=index(inputs, f"{variant}.feat_index"),
    )
    torch.autograd.backward(loss)
    assert features.grad is not None and head.matrix.weight.grad is not None
    return {
        "loss": difference(loss, outputs[f"{variant}.loss"]),
        "features": difference(features.grad, outputs[f"{variant}.grad_features"]),
        "centres": difference(head.matrix.weight.grad, outputs[f"{variant}.grad_centres"]),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("golden", ["unicom_partial_fc"], indirect=True)
def test_one_process_computes_what_the_original_does(golden: Path, variant: str) -> None:
    figures = differences(golden, variant)
    assert figures["loss"] < 1e-5
    assert max(figures["features"], figures["centres"]) < 1e-3


# -- two processes -----------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    """What each of two processes does; the results go to files."""
    place = Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{place / 'meeting'}", rank=rank, world_size=2)
    inputs = np.load(golden_case("unicom_partial_fc") / "inputs.npz")
    head = head_of("arc", inputs)
    half = slice(3 * rank, 3 * rank + 3)
    features = torch.from_numpy(inputs["features"][half]).requires_grad_()
    loss = head(features, torch.from_numpy(inputs["labels"][half]))
    torch.autograd.backward(loss)
    found = {"loss": loss.detach(), "features": features.grad, "centres": head.matrix.weight.grad}

    images, _, labels = multi_label()
    images = images[half].clone().requires_grad_()
    several = MlcdHead(31, 16, scale=8.0, margin=0.3, seed=5)
    several.eval()
    value = several(images, labels[half])
    torch.autograd.backward(value)
    found |= {"mlcd": value.detach(), "images": images.grad, "rows": several.matrix.weight.grad}

    trained = PartialFC(31, 16, sample_rate=0.5, num_channels=8, seed=9)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    learn(trained, optimizer, half, steps=2)
    save_classes(trained.matrix, place / "saved", optimizer)
    dist.barrier()
    load_classes(trained.matrix, place / "one", None)
    found["resumed"] = trained.matrix.weight.detach()
    found["averaged"] = trained_tower(half, DistributedDataParallel)
    found["sharded"] = trained_tower(half, sharded)
    torch.save(found, place / f"{rank}.pt")
    dist.barrier()
    leave(0)


def learn(head: PartialFC, optimizer: torch.optim.Optimizer, part: slice, steps: int) -> None:
    images, _, labels = multi_label()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(head(images[part], labels[part, 0]))
        optimizer.step()


def sharded(tower: Any) -> Any:
    """FSDP2, layer by layer."""
    for number in range(tower.config.num_layers):
        fully_shard(tower.get_submodule(f"layers.{number}"))
    return fully_shard(tower)


def trained_tower(part: slice, wrap: Callable[[Any], Any]) -> Tensor:
    """The losses of a few steps of a tiny tower on this part of each batch."""
    tower = wrap(Tower("clip", models.encoder("clip").tiny(), seed=1))
    head = PartialFC(7, 32, num_channels=16, seed=2)
    # Two, as one cannot update sharded and whole tensors together.
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (tower, head)]
    generator = torch.Generator().manual_seed(4)
    losses = []
    for _ in range(4):
        pixels = torch.randn(6, 3, 28, 28, generator=generator)[part]
        labels = torch.randint(7, (6,), generator=generator)[part]
        loss = step(tower, head, {"pixels": pixels, "labels": labels})
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes computed and saved."""
    folder = tmp_path_factory.mktemp("two")
    alone = PartialFC(31, 16, seed=10)
    save_classes(alone.matrix, folder / "one")
    spawn(work, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return folder


def both(folder: Path, name: str) -> Tensor:
    return torch.cat([torch.load(folder / f"{rank}.pt")[name] for rank in range(2)])


def two_rank_differences(golden: Path, folder: Path) -> dict[str, float]:
    """Of both ranks' losses and of the gradients, concatenated."""
    outputs = np.load(golden / "outputs.npz")
    losses = [torch.load(folder / f"{rank}.pt")["loss"] for rank in range(2)]
    figures = {f"loss{i}": difference(x, outputs["tworank.loss"]) for i, x in enumerate(losses)}
    for name in ("features", "centres"):
        figures[name] = difference(both(folder, name), outputs[f"tworank.grad_{name}"])
    return figures


@pytest.mark.parametrize("golden", ["unicom_partial_fc"], indirect=True)
def test_two_processes_compute_what_the_original_does(golden: Path, two: Path) -> None:
    figures = two_rank_differences(golden, two)
    assert max(figures["loss0"], figures["loss1"]) < 1e-5
    assert max(figures["features"], figures["centres"]) < 1e-3
    outputs = np.load(golden / "outputs.npz")
    # The factor of the embeddings' gradient is the number of processes; classes have none.
    assert difference(both(two, "features"), 2 * outputs["arc.grad_features"]) < 1e-3
    assert difference(both(two, "centres"), outputs["arc.grad_centres"]) < 1e-3


def test_two_processes_compute_mlcds_loss_of_the_whole_batch(two: Path) -> None:
    images, _, labels = multi_label()
    images.requires_grad_()
    rows = MlcdHead(31, 16, seed=5).matrix.weight
    loss = mlcd_loss(images, rows, labels, scale=8.0, margin=0.3)
    torch.autograd.backward(loss)
    assert images.grad is not None and rows.grad is not None
    for rank in range(2):
        torch.testing.assert_close(torch.load(two / f"{rank}.pt")["mlcd"], loss.detach())
    torch.testing.assert_close(both(two, "images"), 2 * images.grad)
    torch.testing.assert_close(both(two, "rows"), rows.grad)


@pytest.mark.parametrize("way", ["averaged", "sharded"])
def test_two_processes_train_a_tower_as_one_does(two: Path, way: str) -> None:
    """DDP and FSDP average the tower's gradients, for which the head's factor makes up."""
    alone = trained_tower(slice(None), lambda tower: tower)
    assert alone[-1] < alone[0]
    for rank in range(2):
        losses = torch.load(two / f"{rank}.pt")[way]
        torch.testing.assert_close(losses, alone, atol=0, rtol=1e-4)


def test_classes_saved_by_two_processes_go_on_in_one(two: Path) -> None:
    assert len(list((two / "saved").iterdir())) == 2
    head = PartialFC(31, 16, sample_rate=0.5, num_channels=8, seed=9)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    load_classes(head.matrix, two / "saved", optimizer)
    assert head.matrix.draws == 2
    state = optimizer.state[head.matrix.weight]
    assert state["exp_avg"].shape == (31, 16)
    assert float(state["step"]) == 2
    before = head.matrix.weight.detach().clone()
    learn(head, optimizer, slice(None), steps=1)
    assert float(state["step"]) == 3
    assert not torch.equal(before, head.matrix.weight)
    # and classes that one process saved, in two
    torch.testing.assert_close(both(two, "resumed"), PartialFC(31, 16, seed=10).matrix.weight)


# -- parts -------------------------------------------------------------------------------------


def test_the_first_ranks_get_the_classes_that_are_left() -> None:
    assert [share(11, rank, 4) for rank in range(4)] == [
        range(0, 3), range(3, 6), range(6, 9), range(9, 11),
    ]  # fmt: skip


def test_first_rows_do_not_depend_on_the_number_of_ranks() -> None:
    from edgevlm.training.towers.class_matrix import _normal_rows

    whole = _normal_rows(range(9000), 9000, 3, 1)
    assert torch.equal(whole[4000:8500], _normal_rows(range(4000, 8500), 9000, 3, 1))
    assert whole.std() == pytest.approx(1, abs=0.05)


def test_sampled_classes_hold_those_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([7, -1, 3, 7])
    chosen = sample_classes(labels, 20, 6, generator)
    assert len(chosen) == 6
    assert {3, 7} <= set(chosen.tolist())
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert sample_classes(labels, 20, 2, generator).tolist() == [3, 7]
    assert sample_classes(labels, 20, 1, generator).tolist() == [3, 7]  # beyond the quota


def test_margins_pass_gradients_as_if_they_were_constants() -> None:
    cosines = torch.tensor([[0.5, 0.2], [0.3, -0.4]], requires_grad=True)
    logits = margin_logits(cosines, torch.tensor([0, -1]), Margin(scale=2.0, angle=0.3))
    expected = 2 * torch.tensor([[np.cos(np.arccos(0.5) + 0.3), 0.2], [0.3, -0.4]])
    torch.testing.assert_close(logits, expected.float())
    torch.autograd.backward(logits.sum())
    torch.testing.assert_close(cosines.grad, torch.full((2, 2), 2.0))


def test_a_cosine_of_one_has_a_finite_gradient() -> None:
    head = PartialFC(5, 4)
    x = head.matrix.weight.detach()[:2].clone().requires_grad_()
    torch.autograd.backward(head(x, torch.tensor([0, 1])))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_evaluation_samples_nothing() -> None:
    images, _, labels = multi_label()
    whole = PartialFC(30, 16, seed=2)
    head = PartialFC(30, 16, sample_rate=0.3, num_channels=5, seed=2).eval()
    torch.testing.assert_close(head(images, labels[:, 0]), whole(images, labels[:, 0]))
    assert head.matrix.draws == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"num_channels": 17}, "num_channels"),
        ({"normalise": False}, "needs cosines"),
    ],
)
def test_impossible_heads_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PartialFC(30, 16, **options)


def test_saves_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    head = PartialFC(30, 16)
    with pytest.raises(CheckpointError, match="0 of 30 classes"):
        load_classes(head.matrix, tmp_path)
    path = save_classes(PartialFC(30, 8).matrix, tmp_path)
    with pytest.raises(CheckpointError, match=r"\[30, 8\], expected \[30, 16\]"):
        load_classes(head.matrix, tmp_path)
    path.rename(tmp_path / "classes-000000004-000000034.safetensors")
    with pytest.raises(CheckpointError, match="does not follow class 0"):
        load_classes(head.matrix, tmp_path)
    save_classes(PartialFC(40, 16).matrix, tmp_path / "more")
    with pytest.raises(CheckpointError, match="holds 40 classes, the model has 30"):
        load_classes(head.matrix, tmp_path / "more")


def test_files_of_two_steps_are_refused(two: Path, tmp_path: Path) -> None:
    first, second = sorted((two / "saved").iterdir())
    later = PartialFC(31, 16)
    later.matrix.draws = 7
    save_classes(later.matrix, tmp_path)
    (whole,) = tmp_path.iterdir()
    whole.rename(tmp_path / second.name)
    (tmp_path / first.name).write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="different steps"):
        load_classes(PartialFC(31, 16).matrix, tmp_path)
