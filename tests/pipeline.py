"""Checkpoint -> bundle -> engine -> answer, the way the command line goes."""

from __future__ import annotations

from pathlib import Path

from engines.build import Request, build
from engines.session import Answer, Question, Session
from export.write import write_bundle
from toolkit import systems
from toolkit.layouts.source import Options
from toolkit.target import parse
from training.torch_files import reader


def silent(message: str) -> None:
    """Progress that nobody reads."""


def engine_of(checkpoint: Path, work: Path, *, target: str = "cpu", dtype: str = "fp32") -> Path:
    """Export and build a checkpoint below `work`; the engine's folder."""
    source = systems.load(checkpoint, Options(torch_reader=reader()))
    bundle, engine = work / "bundle", work / f"engine-{target}"
    if not bundle.exists():
        write_bundle(source, bundle, dtype=dtype, made_by="tests", force=False, progress=silent)
    build(bundle, engine, Request(parse(target), None, False, "tests"), silent)
    return engine


def ask(engine: Path, prompt: str, images: list[Path], tokens: int = 24) -> Answer:
    """A raw prompt, answered greedily."""
    session = Session.open(engine)
    try:
        return session.answer(Question(prompt, images, tokens, template="none"))
    finally:
        session.close()
