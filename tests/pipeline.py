"""Checkpoint -> bundle -> engine -> answer, as the command line does it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgevlm.calibration import weight_only
from edgevlm.engines.build.build import Requantization, Request, build
from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.export import write
from edgevlm.toolkit import systems
from edgevlm.toolkit.checkpoints.layouts.source import Options
from edgevlm.toolkit.target import Target, parse, this_cpu
from edgevlm.training.torch_files import reader

LOSS_IN_4_BITS = 0.7  # more than the tiny models with random weights lose: 0.3 to 0.5


def silent(message: str) -> None:
    """Progress that is not shown."""


def engine_of(
    checkpoint: Path,
    work: Path,
    *,
    target: str = "cpu",
    dtype: str = "fp32",
    quirks: tuple[str, ...] = (),
) -> Path:
    """Export and build a checkpoint below `work`; the engine's folder."""
    source = systems.load(checkpoint, Options(torch_reader=reader(), quirks=quirks))
    bundle, engine = work / "bundle", work / f"engine-{target}"
    if not bundle.exists():
        write.write_bundle(
            source, bundle, dtype=dtype, made_by="tests", force=False, progress=silent
        )
    build(bundle, engine, Request(parse(target), None, False, "tests"), silent)
    return engine


def requantized(
    bundle: Path, kind: str, target: Target | None = None, *, gated: bool = False
) -> Request:
    """A request for `bundle` with weight-only quantization, as `build --precision` makes it.

    gated: refuse a precision loss beyond its limit, as random weights in 4 bits have it.
    """
    source = replace(systems.load(bundle, Options()), plan=weight_only.plan(kind))

    def written(folder: Path) -> None:
        write.write_bundle(source, folder, made_by="tests", progress=silent)

    requantization = Requantization(kind, source.plan, written, lambda: write.graphs(source))
    accept = None if gated or kind == "int8" else LOSS_IN_4_BITS
    return Request(
        target or this_cpu(),
        None,
        False,
        "tests",
        requantization=requantization,
        accept_loss=accept,
    )


def ask(engine: Path, prompt: str, images: list[Path], tokens: int = 24) -> Answer:
    """A raw prompt, answered greedily."""
    session = Session.open(engine)
    try:
        return session.answer(Question(prompt, images, tokens, template="none"))
    finally:
        session.close()
