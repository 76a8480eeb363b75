"""A vision tower by itself: images to embeddings, decoded in threads ahead of the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgevlm.engines import manifest
from edgevlm.engines.backends import LayerTime, Runner, RunnerOptions
from edgevlm.engines.manifest import Engine
from edgevlm.engines.runtime import memory
from edgevlm.engines.runtime.components import open_components
from edgevlm.toolkit.errors import InputError, UnsupportedError
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.images.decode import ImageSource
from edgevlm.toolkit.images.preprocess import preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import asked_threads, threads_here
from edgevlm.toolkit.vlm.components import EMBEDDING
from edgevlm.toolkit.vlm.towers import TowerConfig

MOST = 256  # images at a time
_DECODERS = 4  # threads that decode; more wait for one another's memory


@dataclass(frozen=True)
class Embedded:
    """One image: its embedding float32 [channels], or why there is none."""

    name: str
    vector: Array | None
    reason: str = ""


class Embedder:
    """An engine of a tower by itself, loaded; a context manager that releases it."""

    def __init__(
        self, folder: Path, engine: Engine, model: TowerConfig, runner: Runner, batch: int
    ) -> None:
        self.folder, self.engine, self.model, self.batch = folder, engine, model, batch
        self.load_ms = 0.0
        self._runner = runner
        self._rule = model.images.encoders[model.encoder.name]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        threads: int = 0,
        batch: int | None = None,
        profile: bool = False,
    ) -> Embedder:
        """Load an engine. batch: the most images that it sees at a time; None for what suits it.

        Raises BundleError, TargetMismatch, MissingExtra, OutOfMemory, BuildError, InputError, or
        UnsupportedError for an engine with a language model.
        """
        folder, started = Path(folder), time.perf_counter()
        engine = manifest.read(folder)
        model = tower_of(engine, folder)
        batch = memory.images_at_a_time(engine) if batch is None else batch
        if not 1 <= batch <= MOST:
            raise InputError(f"--batch {batch} is not from 1 to {MOST}")
        cores = asked_threads(threads)
        manifest.check(folder, engine)
        manifest.check_verified(folder, engine)
        needed, target = memory.of_engine(engine, batch), engine.parsed_target()
        memory.require(needed, f"opening {folder} for {batch} images at a time", target)
        (record,) = engine.components
        options = {
            record.name: RunnerOptions(engine.context, threads, profile, plugins=engine.plugins)
        }
        with ExitStack() as opened:
            runners = open_components(folder, engine, options, cores, opened)
            made = cls(folder, engine, model, runners[record.name], batch)
            made.load_ms = 1000 * (time.perf_counter() - started)
            opened.pop_all()
        return made

    def pixels(self, source: ImageSource) -> Array:
        """An image as the tower takes it, float32 [3, height, width]. Raises InputError."""
        rule = self._rule
        loaded = decode.load(source, upright=self.model.images.upright, own_mode=rule.rgb_last)
        return preprocess(loaded.rgb, rule)

    def run(self, pixels: Array) -> Array:
        """pixels [B, 3, height, width] -> embeddings, float32 [B, channels]; not of length 1."""
        return np.array(self._runner.run({"pixels": pixels})[EMBEDDING], np.float32)

    def embed(self, sources: Iterable[ImageSource]) -> Iterator[Embedded]:
        """The embedding of every image, in order; of an image that cannot be read, the reason.

        Images are decoded in threads while the engine computes those before them, a few batches
        ahead at most: memory does not grow with their number.
        """
        with ThreadPoolExecutor(min(threads_here(), _DECODERS)) as pool:
            waiting: deque[tuple[str, Future[Array]]] = deque()
            left = iter(sources)
            while True:
                for source in islice(left, 2 * self.batch - len(waiting)):
                    waiting.append((_name(source), pool.submit(self.pixels, source)))
                if not waiting:
                    return
                yield from self._computed([waiting.popleft() for _ in range(self._next(waiting))])

    def _next(self, waiting: deque[tuple[str, Future[Array]]]) -> int:
        return min(self.batch, len(waiting))

    def _computed(self, group: list[tuple[str, Future[Array]]]) -> Iterator[Embedded]:
        found: dict[int, Array] = {}
        reasons: dict[int, str] = {}
        for number, (_, future) in enumerate(group):
            try:
                found[number] = future.result()
            except InputError as odd:
                reasons[number] = odd.message
        vectors: dict[int, Array] = {}
        if found:
            vectors = dict(zip(found, self.run(np.stack(list(found.values()))), strict=True))
        for number, (name, _) in enumerate(group):
            vector = vectors.get(number)
            if vector is not None and not np.isfinite(vector).all():
                vector, reasons[number] = None, f"image {name} gives values that are no numbers"
            yield Embedded(name, vector, reasons.get(number, ""))

    def layers(self) -> list[LayerTime]:
        """Time per node, for an embedder opened with profile=True."""
        return self._runner.layers()

    def close(self) -> None:
        """Release the engine."""
        self._runner.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def tower_of(engine: Engine, folder: Path) -> TowerConfig:
    """The engine's tower. Raises UnsupportedError if it has a language model."""
    model = engine.parsed_model()
    if isinstance(model, TowerConfig):
        return model
    raise UnsupportedError(
        f"{folder} is an engine of {model.system}, with a language model; embeddings are those of "
        "a vision tower by itself",
        hint="export the tower: edgevlm export TOWER BUNDLE; and ask this one: edgevlm run",
    )


def normalised(vectors: Array) -> Array:
    """[N, channels] with rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)), np.float32)


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, (str, Path)) else "given in memory"
