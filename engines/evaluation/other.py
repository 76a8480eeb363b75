"""What an engine is compared with: another engine, or the NumPy reference of its own bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgevlm.engines import manifest
from edgevlm.engines.evaluation.tasks import Request
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import InputError
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.target import parse

REFERENCE = "reference"


@contextmanager
def opened(request: Request) -> Iterator[tuple[Session, Session]]:
    """The engine, and what it is compared with; both are held at once.

    Raises InputError where they cannot be compared: other vocabularies, or no bundle any more.
    """
    with TemporaryDirectory() as folder:
        against = Path(str(request.against))
        if request.against == REFERENCE:
            against = _reference(request, Path(folder) / "engine")
        with (
            Session.open(request.engine, threads=request.threads) as engine,
            Session.open(against, threads=request.threads) as other,
        ):
            sizes = [session.model.lm.config.vocab_size for session in (engine, other)]
            if sizes[0] != sizes[1]:
                raise InputError(
                    f"{request.engine} has {sizes[0]} tokens, {against} has {sizes[1]}: they are "
                    "not the same model",
                    hint="give an engine of the same checkpoint as --against",
                )
            yield engine, other


def _reference(request: Request, folder: Path) -> Path:
    """An engine of NumPy from the bundle that the engine was built from, float if that is."""
    from edgevlm.engines.build.build import Request as Building
    from edgevlm.engines.build.build import build
    from edgevlm.toolkit.bundle.manifest import MANIFEST, Bundle

    engine = manifest.read(request.engine)
    bundle = Path(engine.bundle)
    here = (bundle / MANIFEST).exists() and Bundle.open(bundle).sha256 == engine.bundle_sha256
    if not here:
        raise InputError(
            f"the bundle {bundle}, which {request.engine} was built from, is not there any more",
            hint="compare with another engine: --against ENGINE; or export it again",
        )
    wanted = Building(
        parse(REFERENCE), engine.context, False, engine.made_by, engine.max_image_tiles
    )
    build(bundle, folder, wanted, request.progress)
    return folder


def log_probabilities(logits: Array) -> Array:
    """Natural logarithms [..., vocab] in float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def divergence(other: Array, engine: Array) -> tuple[Array, Array]:
    """Of log probabilities [n, vocab]: KL(other || engine) in nats, and whether the likeliest token
    is the same; both [n].
    """
    kl = (np.exp(other) * (other - engine)).sum(-1, dtype=np.float64)
    return np.maximum(kl, 0.0), other.argmax(-1) == engine.argmax(-1)
