"""What is told of a calibration for weights in 8 and 4 bits."""

from __future__ import annotations

from edgevlm.calibration import drift
from edgevlm.calibration.calibrate import Calibration
from edgevlm.calibration.report import Told, worst
from edgevlm.toolkit.bundle.manifest import Bundle
from edgevlm.toolkit.strict import to_plain

_SHOWN = 5  # of the linears


def told(result: Calibration, written: Bundle) -> Told:
    """written: the bundle with the codes."""
    quality, drifts = result.quality, drift.of(written)
    data = {
        **to_plain(quality),
        "perplexity_growth": quality.growth,
        "answers": to_plain(result.answers),
        "share_4_bits": result.share_4_bits,
        "layers": to_plain(result.layers),
    }
    lines = [
        f"perplexity       {quality.perplexity_float:.2f} -> {quality.perplexity:.2f} "
        f"({quality.growth:+.2%}), on {quality.tokens:,} tokens of held-out text",
        f"KL to float      {quality.kl:.4f}, same likeliest token {quality.same_top_1:.1%}",
        f"greedy           {result.answers.text}",
        f"in 4 bits        {result.share_4_bits:.0%} of the weights of the layers' linears",
        *worst(result.layers, _SHOWN),
    ]
    return Told(
        ("in codes", "cosine", "relative rms"),
        {
            n: (f"{d.share:.0%}", f"{d.cosine:.5f}", f"{d.relative_rms:.3f}")
            for n, d in drifts.items()
        },
        {name: to_plain(found) for name, found in drifts.items()},
        data,
        lines,
    )
