"""A vision tower by itself on devices that are not at hand: does it fit, how many images a second.

As predict.py for whole models: memory is the estimate that embedding uses, time adds up ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edgevlm.engines.runtime import memory
from edgevlm.engines.sizing import work as working
from edgevlm.engines.sizing.predict import Format, notes_of, told
from edgevlm.engines.sizing.rates import Machine
from edgevlm.engines.sizing.work import Time
from edgevlm.toolkit.ops.costs import Cost
from edgevlm.toolkit.vlm.components import components
from edgevlm.toolkit.vlm.cost import count, image_axes, stored_bytes
from edgevlm.toolkit.vlm.towers import TowerConfig

MOST = 256  # images at a time


@dataclass(frozen=True)
class TowerPrediction:
    """The result for one device and number format; the keys of `plans[]` in --json.

    image_ms: of one image by itself, from its pixels to its embedding; images_per_s: in batches of
    `batch`, as many as `embed` takes there. fits: whether such a batch is held at once;
    largest_batch: the most images that are, 0 for none. limited_by: what most of the time of a
    batch goes into.
    """

    target: str
    device: str
    precision: str
    fits: bool
    weights_bytes: int
    activations_bytes: int
    runtime_bytes: int
    total_bytes: int
    memory_bytes: int
    image_ms: float
    images_per_s: float
    batch: int
    limited_by: str
    channels: int
    largest_batch: int
    peaks_measured: bool
    notes: tuple[str, ...] = field(default=())


class TowerPlanner:
    """Predictions for one tower."""

    def __init__(self, model: TowerConfig) -> None:
        self._model = model
        (self._part,) = components(model)
        self._costs: dict[int, tuple[Cost, ...]] = {}  # of a call, by its images

    def predict(self, given: Format, machine: Machine) -> TowerPrediction:
        """The tower in one number format on one device."""
        size = memory.element_bytes(machine.target, given.dtype)
        weights = stored_bytes(self._model, given.plan, size)[self._part.name]
        runtime = machine.efficiency.runtime_bytes
        room = machine.memory_bytes - machine.efficiency.reserved_bytes
        batch = memory.images_together(self._model, machine.target, size)

        image = memory.of_model(self._model, 0, 0, size).activations_bytes
        total = weights + batch * image + runtime
        whole, single = (self.time(n, given, size, machine) for n in (batch, 1))
        return TowerPrediction(
            target=str(machine.target),
            device=machine.name,
            precision=given.name,
            fits=total <= room,
            weights_bytes=weights,
            activations_bytes=batch * image,
            runtime_bytes=runtime,
            total_bytes=total,
            memory_bytes=room,
            image_ms=round(1000 * single.seconds, 3),
            images_per_s=round(batch / whole.seconds, 2),
            batch=batch,
            limited_by=whole.limited_by,
            channels=self._model.channels,
            largest_batch=min(max((room - weights - runtime) // image, 0), MOST),
            peaks_measured=machine.measured,
            notes=notes_of(given, machine, caches=False),
        )

    def time(self, images: int, given: Format, size: int, machine: Machine) -> Time:
        """Of so many images in one call. size: bytes of a float."""
        if images not in self._costs:
            axes = image_axes(self._model, 1, 1) | {"tiles": images}
            self._costs[images] = tuple(count(self._part, axes).costs)
        call = working.Call(self._part.name, 1, self._costs[images])
        return working.stages([call], {"": given.plan}, size, machine)[self._part.name]


# -- for people ----------------------------------------------------------------------------------


def lines(found: Sequence[TowerPrediction]) -> list[str]:
    """A table of predictions, and what it rests on."""
    from edgevlm.toolkit.terminal.console import human_bytes, table

    rows = [
        (
            p.device,
            p.precision,
            human_bytes(p.total_bytes),
            "yes" if p.fits else "NO",
            p.image_ms,
            p.images_per_s,
            p.batch,
            p.limited_by,
            p.largest_batch,
        )
        for p in found
    ]
    columns = (
        *("device", "precision", "memory", "fits", "an image ms", "images/s", "in batches of"),
        *("limited by", "largest batch"),
    )
    return [
        f"a vision tower by itself: embeddings of {found[0].channels} channels",
        *table(columns, rows),
        *told((p.device, p.notes) for p in found),
    ]
