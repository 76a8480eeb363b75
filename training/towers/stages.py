"""The published trainings of vision towers as data.

Sources: MLCD, arXiv 2407.17331; UNICOM, arXiv 2304.05884, and the scripts of deepglint/unicom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from edgevlm.training.options import Schedule


@dataclass(frozen=True)
class TowerStage:
    """One training of a tower.

    loss: whose head it has. num_classes: None where the data decide. labels: positive classes of
    an image. sample_rate: share of the classes that a step compares with. num_channels: channels
    that a step uses, None for all. global_batch: images of a step on all ranks together.
    head_factor: learning rate of the class matrix over that of the tower. warmup_share: of all
    steps. area: shares of an image that a crop may have. ours: fields whose values were not
    published and are our choice.
    """

    name: str
    purpose: str
    loss: Literal["mlcd", "partial_fc"]
    image_size: int
    num_classes: int | None
    epochs: float
    global_batch: int
    learning_rate: float
    labels: int = 1
    scale: float = 32.0
    margin: float = 0.3
    cosine_margin: float = 0.0
    filter_above: float = 0.0
    sample_rate: float = 1.0
    num_channels: int | None = None
    head_factor: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "one_cycle"
    warmup_share: float = 0.1
    drop_path: float = 0.0
    area: tuple[float, float] = (0.4, 1.0)
    ours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.ours) - {field.name for field in fields(self)}
        assert not unknown, unknown


_MLCD = TowerStage(
    name="mlcd-tower",
    purpose="pre-training on clusters, several an image",
    loss="mlcd",
    image_size=224,
    num_classes=1_000_000,
    labels=8,
    epochs=32,
    global_batch=32_768,
    learning_rate=1e-3,
    weight_decay=0.2,
    sample_rate=0.1,
    scale=64.0,
    margin=0.3,
    betas=(0.9, 0.98),
    schedule="cosine",
    warmup_share=0.05,
    ours=("scale", "margin", "betas", "schedule", "warmup_share", "head_factor", "area"),
)

_UNICOM = TowerStage(
    name="unicom-tower",
    purpose="pre-training on clusters, one an image",
    loss="partial_fc",
    image_size=224,
    num_classes=1_000_000,
    epochs=32,
    global_batch=32_768,
    learning_rate=1e-3,
    weight_decay=0.05,
    sample_rate=0.1,
    num_channels=512,
    drop_path=0.1,
    ours=(
        "epochs", "global_batch", "learning_rate", "weight_decay", "sample_rate", "num_channels",
        "scale", "margin", "head_factor", "betas", "schedule", "warmup_share", "area",
    ),
)  # fmt: skip

# Fine-tuning for retrieval: the scripts' values. Their batches are 16 to 128 images a GPU.
_RETRIEVAL = TowerStage(
    name="unicom-sop",
    purpose="fine-tuning for retrieval: Stanford Online Products",
    loss="partial_fc",
    image_size=224,
    num_classes=11_318,
    epochs=64,
    global_batch=1024,
    learning_rate=1e-5,
    margin=0.25,
    num_channels=512,
    head_factor=10.0,
    drop_path=0.1,
    ours=("global_batch", "area"),
)

STAGES: Mapping[str, TowerStage] = {
    stage.name: stage
    for stage in (
        _MLCD,
        replace(
            _MLCD,
            name="mlcd-tower-336",
            purpose="one more epoch at 336 pixels",
            image_size=336,
            epochs=1,
            learning_rate=1e-4,
            ours=(*_MLCD.ours, "global_batch", "learning_rate", "weight_decay", "sample_rate"),
        ),
        _UNICOM,
        _RETRIEVAL,
        replace(
            _RETRIEVAL,
            name="unicom-in-shop",
            purpose="fine-tuning for retrieval: In-Shop Clothes",
            num_classes=None,
        ),
        replace(
            _RETRIEVAL,
            name="unicom-inaturalist",
            purpose="fine-tuning for retrieval: iNaturalist",
            num_classes=5690,
            margin=0.35,
        ),
        replace(
            _RETRIEVAL,
            name="unicom-landmarks",
            purpose="fine-tuning for retrieval at 512 pixels: Google Landmarks",
            image_size=512,
            num_classes=81_314,
            margin=0.5,
            sample_rate=0.5,
            num_channels=None,
            head_factor=3.0,
            learning_rate=1e-4,
            ours=(*_RETRIEVAL.ours, "learning_rate", "epochs", "num_channels"),
        ),
    )
}
