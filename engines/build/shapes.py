"""The sizes that calls of an engine may have, for backends that compile for shapes."""

from __future__ import annotations

from collections.abc import Mapping

from edgevlm.engines.backends import Shapes, Size
from edgevlm.engines.manifest import PREFILL_CHUNK
from edgevlm.engines.profiling.roofline import question
from edgevlm.toolkit.bundle.goldens import AXES
from edgevlm.toolkit.vlm.components import after_answer, one_image_each
from edgevlm.toolkit.vlm.cost import image_axes
from edgevlm.toolkit.vlm.towers import Model, TowerConfig

IMAGES = (8, 32)  # that a tower by itself usually sees at a time, and at most
TOGETHER = 8  # sequences that get a token in one call, at most: as many as `serve` has slots
_SCORED = 8  # a session scores one token at a time; goldens and perplexities a few more


def of(component: str, model: Model, context: int) -> Shapes:
    """The profiles of one component of a model with so many positions of KV cache.

    The language model has three: pieces of a prompt; exactly one token, for which builders have
    other kernels; and one token of each of several sequences, at positions of their own. An encoder
    of images of any size has that of its images, and that of the goldens.
    """
    if isinstance(model, TowerConfig):
        return Shapes(context, ({"tiles": (1, *IMAGES)},))
    if component == model.lm.name:
        return Shapes(context, _of_language_model(model, context))
    usual = _usual(model)
    views = _most_views(model)
    seen: dict[str, Size] = {name: (size, size, size) for name, size in usual.items()}
    seen |= {"tiles": (1, usual["tiles"], views), "rows": (1, usual["rows"], context)}
    seen |= {"placed": (1, usual["placed"], context), "masks": (1, 1, 1)}
    if component in one_image_each(model):
        seen["tiles"] = (1, 1, 1)  # a session shows an encoder one view at a time
    loose = any(isinstance(e.config.tokens, str) for e in model.encoders)
    if not loose or component in ("arrange", *after_answer(model)):
        return Shapes(context, (seen,))
    golden = {n: (AXES[n],) * 3 for n in ("height", "width", "tokens", "tiles")}
    return Shapes(context, (seen, {**seen, **golden}))


def _of_language_model(model: Model, context: int) -> tuple[Mapping[str, Size], ...]:
    piece = min(PREFILL_CHUNK, context)
    rows = (1, min(_usual(model)["rows"], context), context)
    one: Size = (1, 1, 1)
    prompt = {"batch": one, "sequence": (1, piece, piece), "rows": rows, "scored": (1, 1, _SCORED)}
    token = {"batch": one, "sequence": one, "rows": rows, "scored": one}
    return prompt, token, {**token, "batch": (2, TOGETHER, TOGETHER)}


def _usual(model: Model) -> dict[str, int]:
    """The axes of one usual question."""
    work = question(model)
    axes = image_axes(model, work.views, work.image_tokens)
    return {**axes, "rows": work.image_tokens}


def _most_views(model: Model) -> int:
    """The most views that an image is seen in."""
    tiling = model.images.tiling
    if tiling is None:
        return 1
    return 1 + max((w // tiling.tile) * (h // tiling.tile) for w, h in tiling.pinpoints)
