"""What a server of an engine hands its requests to: questions to one kind, images to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from edgevlm.engines import manifest
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.embedding import EmbeddingQueue
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.scheduler import Scheduler
from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.vlm.towers import TowerConfig

Work: TypeAlias = "Scheduler | EmbeddingQueue"
CHAT, EMBEDDINGS = "chat", "embeddings"


def is_tower(engine: Path) -> bool:
    """Whether an engine is one of a vision tower by itself. Raises BundleError."""
    return isinstance(manifest.read(engine).parsed_model(), TowerConfig)


def kind_of(work: Work) -> str:
    """What is asked of it."""
    return EMBEDDINGS if isinstance(work, EmbeddingQueue) else CHAT


@contextmanager
def opened(
    engine: Path,
    limits: Limits,
    *,
    slots: int | None = None,
    threads: int = 0,
    strict: bool = False,
    speculate: bool = False,
) -> Iterator[Work]:
    """An engine that takes requests within `limits`; it is closed at the end.

    slots: answers, or images of a tower, at a time; None for those of `limits`, or for what suits
    the tower. Raises what opening an engine raises, and ConfigError for what a tower has not.
    """
    limits = (limits if slots is None else replace(limits, slots=slots)).check()
    work: Work
    if is_tower(engine):
        _check_tower(limits, {"--strict": strict, "--speculate": speculate})
        with Embedder.open(engine, threads=threads, batch=slots) as tower:
            work = EmbeddingQueue(tower, replace(limits, slots=tower.batch))
            try:
                yield work
            finally:
                work.close()
        return
    with Session.open(engine, threads=threads, replies=1) as session:
        work = Scheduler(session, limits, strict=strict, speculate=speculate)
        try:
            yield work
        finally:
            work.close()


def _check_tower(limits: Limits, flags: dict[str, bool]) -> None:
    """Raise ConfigError for options of answers."""
    usual = Limits()
    given = [name for name, value in flags.items() if value]
    given += ["--max-tokens"] * (limits.max_tokens != usual.max_tokens)
    given += ["--image-cache-mb"] * (limits.image_cache_bytes != usual.image_cache_bytes)
    if given:
        raise ConfigError(
            f"{given[0]} is for answers: this engine is a vision tower by itself, which has none",
            hint="leave the option out",
        )
