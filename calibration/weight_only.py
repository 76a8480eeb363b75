"""Plans that need no samples: weights alone in fewer bits, rounded to nearest."""

from __future__ import annotations

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.plan import PrecisionPlan, Rule

KINDS = ("int8", "int4")
ROWS = "int8-rows"  # inputs in 8 bits too, without samples: one step per row, found when it runs


def plan(kind: str, option: str = "--precision") -> PrecisionPlan:
    """int8: every linear and the embedding table. int4: the language model's layers in 4 bits.

    Encoders, merger, embedding table and output layer stay at 8 bits there: they are a small part
    of the bytes that a token reads, and lose more by rounding. int8-rows: every linear with its
    input (toolkit/quantization/channels.py), the embedding table as in int8. Raises ConfigError
    for other names, which `option` stated.
    """
    if kind == ROWS:
        return PrecisionPlan("int8_rows", method="round to nearest")
    if kind not in KINDS:
        known = ", ".join((*KINDS, ROWS))
        raise ConfigError(f"{option} {kind!r} is unknown", hint=f"known: {known}")
    rules = (Rule("lm/layers.*", "int4_weights"),) if kind == "int4" else ()
    return PrecisionPlan("int8_weights", rules, method="round to nearest")
