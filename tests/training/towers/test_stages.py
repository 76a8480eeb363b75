"""Tower stages: what was published, and that a tiny tower learns by each loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.optimizer import set_rates
from edgevlm.training.stages import find_tower
from edgevlm.training.towers.mlcd_loss import MlcdHead
from edgevlm.training.towers.partial_fc import Margin, PartialFC
from edgevlm.training.towers.parts import class_accuracy, make_head, make_optimizers, step
from edgevlm.training.towers.stages import STAGES, TowerStage
from edgevlm.training.towers.tower import KINDS, Tower
from tests.training.towers.test_tower import tiny

GROUPS = 8


def set_step(stage: TowerStage, optimizers: Sequence[Any], step: int, steps: int) -> None:
    """The rates of a step."""
    for optimizer in optimizers:
        set_rates(optimizer, step, steps, round(stage.warmup_share * steps), stage.schedule)


def images(tower: Tower, labels: Tensor, seed: int) -> Tensor:
    """Noise around one random picture per group."""
    pictures = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(seed)
    size = (3, *tower.config.pixels)
    pattern = torch.randn(GROUPS, *size, generator=pictures)
    return pattern[labels] + torch.randn(len(labels), *size, generator=noise)


def classes_of(labels: Tensor, several: bool) -> Tensor:
    """Two classes per group for MLCD, one for UNICOM."""
    return torch.stack([labels, labels + GROUPS], 1) if several else labels


@pytest.mark.parametrize(
    ("kind", "name"),
    [("clip", "mlcd-tower"), ("mlcd", "mlcd-tower"), ("unicom", "unicom-tower")],
)
def test_a_tiny_tower_learns_to_separate_groups(kind: str, name: str) -> None:
    torch.manual_seed(0)
    several = name == "mlcd-tower"
    stage = replace(find_tower(name), sample_rate=0.5, learning_rate=2e-3, head_factor=10.0)
    tower = Tower(kind, tiny(kind), drop_path=stage.drop_path)
    channels = 16 if kind == "unicom" else None
    stage = replace(stage, num_channels=channels, scale=16.0)
    head = make_head(stage, tower.channels, num_classes=2 * GROUPS)
    held_out = torch.arange(GROUPS).repeat(8)
    truth = classes_of(held_out, several)

    def accuracy() -> float:
        tower.eval()
        with torch.no_grad():
            found = class_accuracy(tower(images(tower, held_out, 99)), head, truth)
        tower.train()
        return found

    before = accuracy()
    optimizers = make_optimizers(stage, tower, head)
    losses = []
    generator = torch.Generator().manual_seed(3)
    for number in range(60):
        labels = torch.randint(GROUPS, (16,), generator=generator)
        batch = {"pixels": images(tower, labels, 100 + number)}
        loss = step(tower, head, batch | {"labels": classes_of(labels, several)})
        set_step(stage, optimizers, number, 60)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    after = accuracy()
    print(f"{kind}: loss {np.mean(losses[:5]):.2f} -> {np.mean(losses[-5:]):.2f}, "
          f"accuracy {before:.2f} -> {after:.2f}")  # fmt: skip
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert before < 0.4
    assert after > 0.9


def test_published_values() -> None:
    mlcd, unicom = find_tower("mlcd-tower"), find_tower("unicom-tower")
    published = ("num_classes", "labels", "sample_rate", "epochs", "global_batch",
                 "learning_rate", "weight_decay")  # fmt: skip
    values = [getattr(mlcd, name) for name in published]
    assert values == [1_000_000, 8, 0.1, 32, 32_768, 1e-3, 0.2]
    assert not set(published) & set(mlcd.ours)
    assert (unicom.num_classes, unicom.drop_path) == (1_000_000, 0.1)
    margins = {name: stage.margin for name, stage in STAGES.items() if name[:6] == "unicom"}
    assert margins == {
        "unicom-tower": 0.3,
        "unicom-sop": 0.25,
        "unicom-in-shop": 0.25,
        "unicom-inaturalist": 0.35,
        "unicom-landmarks": 0.5,
    }
    assert find_tower("unicom-landmarks").sample_rate == 0.5
    with pytest.raises(ConfigError, match="no training stage 'clip'"):
        find_tower("clip")
    with pytest.raises(ConfigError, match="llava-finetune trains a whole model"):
        find_tower("llava-finetune")


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_makes_its_parts(name: str) -> None:
    stage = find_tower(name)
    tower = Tower("unicom", tiny("unicom"), drop_path=stage.drop_path)
    head = make_head(stage, tower.channels, num_classes=40)
    assert isinstance(head, MlcdHead if stage.loss == "mlcd" else PartialFC)
    optimizers = make_optimizers(stage, tower, head)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx(
        [stage.learning_rate] * 2 + [stage.learning_rate * stage.head_factor]
    )
    seen = []
    for number in range(100):
        set_step(stage, optimizers, number, 100)
        seen.append(optimizers[0].param_groups[0]["lr"])
    warm = round(100 * stage.warmup_share)
    assert max(seen) == pytest.approx(stage.learning_rate)
    assert int(np.argmax(seen)) in (warm - 1, warm)
    assert seen[-1] < 0.01 * stage.learning_rate


def test_one_cycle_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [parameter], "lr": 3e-3, "base_rate": 3e-3}]
    ours, theirs = torch.optim.AdamW(groups), torch.optim.AdamW([parameter], 3e-3)
    schedule = OneCycleLR(theirs, 3e-3, total_steps=50, pct_start=0.1)
    for number in range(50):
        set_rates(ours, number, 50, 5, "one_cycle")
        for key in ("lr", "betas"):
            expected = theirs.param_groups[0][key]
            assert ours.param_groups[0][key] == pytest.approx(expected), (number, key)
        theirs.step()
        schedule.step() if number < 49 else None


def test_the_number_of_classes_must_be_known() -> None:
    with pytest.raises(ConfigError, match="number of classes"):
        make_head(find_tower("unicom-in-shop"), 32)


def test_the_head_is_made_as_the_stage_says() -> None:
    stage = replace(find_tower("unicom-sop"), cosine_margin=0.4, filter_above=0.1)
    head: Any = make_head(stage, 768, num_classes=10)
    assert head.margin == Margin(32.0, 0.25, 0.4, 0.1)
    assert head.num_channels == 512
    smaller: Any = make_head(stage, 24, num_classes=10)
    assert smaller.num_channels == 24
    assert len(KINDS) == 3
