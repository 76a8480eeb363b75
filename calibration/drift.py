"""What weights in fewer bits do to each component of a written bundle, from what lies in it."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.calibration.appraise import Compared
from edgevlm.toolkit.bundle import goldens
from edgevlm.toolkit.bundle.goldens import Golden
from edgevlm.toolkit.bundle.manifest import GOLDENS, Bundle
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.vlm import components
from edgevlm.toolkit.vlm.components import Component
from edgevlm.toolkit.vlm.cost import count, image_axes, weight_bits


@dataclass(frozen=True)
class Drift:
    """A component's outputs beside the float model's on the bundle's golden inputs, random ones.

    share: of its multiply-adds for one image and one token, those with weights in codes.
    """

    cosine: float
    relative_rms: float
    share: float


def of(bundle: Bundle) -> dict[str, Drift]:
    """Of every component of a quantized bundle."""
    every = goldens.load(bundle.path / GOLDENS)
    axes = image_axes(bundle.model, 1, 1) | {"sequence": 1, "context": 1}
    found = {}
    for part in components.components(bundle.model):
        compared = Compared()
        for golden in every:
            if golden.component == part.name:
                _add(compared, golden, part)
        counted = count(part, axes)
        low = sum(c.flops for c in counted.costs if weight_bits(c, bundle.manifest.plan))
        share = low / max(counted.flops, 1)
        found[part.name] = Drift(compared.cosine, compared.relative_rms, share)
    return found


def _add(compared: Compared, golden: Golden, part: Component) -> None:
    for port in part.outputs:
        if port.name in golden.float_outputs:
            pair = (golden.float_outputs[port.name], golden.outputs[port.name])
            compared.add(*(_meaning(port.name, x, golden, part) for x in pair))


def _meaning(port: str, values: Array, golden: Golden, part: Component) -> Array:
    """Logits less the mean of their row: a constant added to one says nothing."""
    if port != "logits":
        return values
    vocabulary = next(int(p.shape[-1]) for p in part.outputs if p.name == port)
    return goldens.centered(values, (golden.inputs["score"].size, vocabulary))
