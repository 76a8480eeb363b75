"""From images to feature rows: views, encoders, merger, by walking the manifest's edges.

Encoders see one view at a time, which bounds memory and makes an answer independent of how many
images came along. Several encoders run side by side where the machine has cores for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edgevlm.engines.backends import Runner
from edgevlm.engines.backends.tensors import Tensor, join, keep
from edgevlm.engines.manifest import Engine
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.finite import check_outputs
from edgevlm.toolkit.bundle.manifest import ComponentRecord
from edgevlm.toolkit.images import views
from edgevlm.toolkit.images.decode import LoadedImage
from edgevlm.toolkit.images.views import PreparedImage
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm.components import Edge, after_answer
from edgevlm.toolkit.vlm.config import ModelConfig

CORES_PER_ENCODER = 4  # with fewer, encoders that run side by side slow each other down


def side_by_side(encoders: int, threads: int, *, on_card: bool = False) -> bool:
    """Whether several encoders should run at the same time on `threads` processors.

    A graphics card takes work of several streams; a thread of each encoder only hands it out.
    """
    return encoders > 1 and (on_card or threads >= CORES_PER_ENCODER * encoders)


@dataclass(frozen=True)
class Features:
    """Feature rows of all images [F, hidden_size]; for each image the indices of its tokens.

    rows: where the backend has computed them, in the host's memory or on its card.
    """

    rows: Tensor
    indices: tuple[Array, ...]


class Vision:
    """The components before the language model."""

    def __init__(
        self, model: ModelConfig, engine: Engine, runners: Mapping[str, Runner], *, together: bool
    ) -> None:
        self._model = model
        self._runners = runners
        self._sources = {edge.target: edge.source for edge in engine.edges}
        later = {model.lm.name, *after_answer(model)}
        before_lm = [r for r in engine.components if r.name not in later]
        self._encoders = [r for r in before_lm if _sees_pixels(r, engine.edges)]
        self._after = [r for r in before_lm if r not in self._encoders]
        self._output = self._sources[f"{model.lm.name}:features"]
        width: int = model.lm.config.hidden_size
        self._none = Features(np.zeros((1, width), np.float32), ())
        self._pool = ThreadPoolExecutor(len(self._encoders)) if together else None

    def encode(
        self,
        images: Sequence[LoadedImage],
        clock: Clock,
        *,
        tiles: bool = True,
        count: int | None = None,
    ) -> Features:
        """Features of all images. tiles=False gives every image one view (chat scripts). Raises
        AccuracyError naming the component that computes no numbers.

        count: the images of the whole question, where these are some of them.
        """
        if not images:
            return self._none
        rows, indices, start = [], [], 0
        for image in images:
            features, order = self._image(image, count or len(images), clock, tiles)
            rows.append(features)
            indices.append(order + start)
            start += features.shape[0]
        return Features(join(rows), tuple(indices))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _image(
        self, image: LoadedImage, count: int, clock: Clock, tiles: bool
    ) -> tuple[Tensor, Array]:
        with clock.time("preprocess"):
            seen = views.prepare(image.rgb, self._model.images, count=count, tiles=tiles)
        values = self._encoded(seen, clock)
        order = seen.order
        if order is not None:
            values |= {"arrangement.rows": order.rows, "arrangement.weights": order.weights}
        for record in self._after:
            self._run(record, values, clock)
        features = values[self._output]
        mixed = any(source.startswith("arrangement.") for source in self._sources.values())
        every = np.arange(features.shape[0])
        return features, every if order is None or mixed else order.rows[:, 0]

    def _encoded(self, seen: PreparedImage, clock: Clock) -> dict[str, Tensor]:
        """Every encoder's outputs, the views of an image on the first axis."""
        outputs: dict[str, list[Tensor]] = {}
        for view in seen.pixels:
            pixels = {f"images.{name}": array[None] for name, array in view.items()}
            values: dict[str, Tensor] = dict(pixels)
            if self._pool is None:
                for record in self._encoders:
                    self._run(record, values, clock)
            else:
                futures = [self._pool.submit(self._run, r, values, clock) for r in self._encoders]
                for future in futures:
                    future.result()
            for name in values.keys() - pixels.keys():
                outputs.setdefault(name, []).append(values[name])
        return {name: join(tensors) for name, tensors in outputs.items()}

    def _run(self, record: ComponentRecord, values: dict[str, Tensor], clock: Clock) -> None:
        inputs = {p.name: values[self._sources[f"{record.name}:{p.name}"]] for p in record.inputs}
        with clock.time(record.name):
            outputs = keep(self._runners[record.name], inputs)
        check_outputs(record.name, outputs)
        values.update({f"{record.name}:{name}": array for name, array in outputs.items()})


def _sees_pixels(record: ComponentRecord, edges: Sequence[Edge]) -> bool:
    return any(
        e.source.startswith("images.") and e.target.startswith(f"{record.name}:") for e in edges
    )
