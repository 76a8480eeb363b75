"""What is computed in which number format: a plan is rules over places in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

# int8: inputs and weights; int8_weights, int4_weights: weights alone (blockwise.py)
Precision = Literal["float", "int8", "int8_weights", "int4_weights"]
WEIGHT_BITS: dict[Precision, Literal[8, 4]] = {"int8_weights": 8, "int4_weights": 4}


@dataclass(frozen=True)
class Rule:
    """Places whose path matches `paths` (a glob: lm/layers.*/mlp/*) run in `precision`."""

    paths: str
    precision: Precision


@dataclass(frozen=True)
class PrecisionPlan:
    """Rules, the last match wins; `ranges` holds the largest |x| seen at each place's input.

    `method` says how the ranges were found; `samples` and `samples_sha256` say from what.
    """

    default: Precision = "float"
    rules: tuple[Rule, ...] = ()
    ranges: Mapping[str, float] = field(default_factory=dict)
    method: str = "none"
    samples: int = 0
    samples_sha256: str = ""

    @property
    def precisions(self) -> frozenset[Precision]:
        """All that the plan names, "float" aside; empty for a float model."""
        return frozenset({self.default, *(rule.precision for rule in self.rules)} - {"float"})

    def at(self, path: str) -> Precision:
        """The precision of one place, for example lm/layers.3/attention/q."""
        chosen = self.default
        for rule in self.rules:
            if fnmatchcase(path, rule.paths):
                chosen = rule.precision
        return chosen
