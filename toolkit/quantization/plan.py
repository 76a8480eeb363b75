"""The precision plan: which layer of a model is computed in which number format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.quantization.blockwise import LINEAR, StorageFormat

# int8, fp8: inputs and weights, in steps known beforehand (static.py); int8_rows: the same with the
# inputs' steps found when it runs (channels.py); int8_weights, int4_weights: weights alone
# (blockwise.py)
Precision = Literal["float", "int8", "fp8", "int8_rows", "int8_weights", "int4_weights"]
Block = Literal[16, 32, 64, 128]
WEIGHT_BITS: dict[Precision, Literal[8, 4]] = {"int8_weights": 8, "int4_weights": 4}
MOST_RULES = 8192
TABLES_IN_8_BITS = frozenset[Precision]((*WEIGHT_BITS, "int8_rows"))  # embedding tables


@dataclass(frozen=True)
class Rule:
    """Layers whose path matches the glob `paths` (lm/layers.*/mlp/*) run in `precision`.

    block: of weights in 8 or 4 bits, the most inputs that share a scale; None for the usual 128.
    zero_points: whether each block of such weights has a zero point of its own. ordered: whether
    blocks are of inputs in an order of their own.
    """

    paths: str
    precision: Precision
    block: Block | None = None
    zero_points: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class PrecisionPlan:
    """Rules, of which the last match wins; ranges: the largest |x| of each layer's input, by path.

    method: how the plan was made. samples, samples_sha256: number and hash of the samples used.
    """

    default: Precision = "float"
    rules: tuple[Rule, ...] = ()
    ranges: Mapping[str, float] = field(default_factory=dict)
    method: str = "none"
    samples: int = 0
    samples_sha256: str = ""

    def __post_init__(self) -> None:
        """Raise ConfigError for more rules than any model has layers."""
        if len(self.rules) > MOST_RULES:
            raise ConfigError(f"a plan has {len(self.rules)} rules, expected at most {MOST_RULES}")

    @property
    def precisions(self) -> frozenset[Precision]:
        """All that the plan names, "float" aside; empty for a float model."""
        return frozenset({self.default, *(rule.precision for rule in self.rules)} - {"float"})

    def at(self, path: str) -> Precision:
        """The precision of the layer at `path`, for example lm/layers.3/attention/q."""
        return self._rule(path).precision

    def block_at(self, path: str) -> Block | None:
        """The most inputs that share a scale in the weight of the layer at `path`."""
        return self._rule(path).block

    def storage_at(self, path: str) -> StorageFormat | None:
        """How the weight of the linear at `path` is stored; None in float, or by channel."""
        rule = self._rule(path)
        bits = WEIGHT_BITS.get(rule.precision)
        if bits is None:
            return None
        return replace(
            LINEAR[bits], block=rule.block, zero_points=rule.zero_points, ordered=rule.ordered
        )

    def _rule(self, path: str) -> Rule:
        chosen = Rule("*", self.default)
        for rule in self.rules:
            if fnmatchcase(path, rule.paths):
                chosen = rule
        return chosen
