"""LLaVA's projectors by name: linear, identity, mlp{N}x_gelu, mlp{N}x_res{R}x_gelu, pooler."""

from __future__ import annotations

import math
import re

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.mergers import mlp, pooler
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.vlm.config import ComponentConfig


def linears(r: Reader, encoder: ComponentConfig, outputs: int) -> ComponentConfig:
    """The projector that config.json names, for one encoder."""
    name, inputs = read_name(r, encoder), encoder.config.hidden_sizes
    if name == "pooler":
        side = math.isqrt(encoder.config.tokens)
        return ComponentConfig("merger", "pooler", pooler.Config(sum(inputs), outputs, side))
    layers, blocks = depth(r, name)
    check_identity(r, layers, sum(inputs), outputs)
    return ComponentConfig("merger", "mlp", mlp.Config(inputs, outputs, layers, blocks=blocks))


def check_identity(r: Reader, layers: int, inputs: int, outputs: int) -> None:
    """Raise ConfigError if no linear stands between channels of another number."""
    if layers == 0 and inputs != outputs:
        raise ConfigError(
            f"{r.where}: an identity projector joins {inputs} channels to the language "
            f"model's {outputs}",
            hint="the tower or the language model belongs to another checkpoint",
        )


def read_name(r: Reader, encoder: ComponentConfig) -> str:
    """mm_projector_type, after checking that mm_hidden_size is what the encoder gives."""
    width, given = sum(encoder.config.hidden_sizes), r.count("mm_hidden_size")
    if given not in (width, encoder.config.hidden_sizes[0]):
        raise ConfigError(
            f"{r.where}: mm_hidden_size = {given}, the tower gives {width}",
            hint="the tower belongs to another model, or the select layer does",
        )
    return r.take("mm_projector_type", str, "linear")


def depth(r: Reader, name: str) -> tuple[int, int]:
    """Linears and residual blocks of a projector type."""
    if name == "identity":
        return 0, 0
    match = re.fullmatch(r"linear|mlp(\d+)x(?:_res(\d+)x)?_gelu", name)
    if match is None or match[1] == "0":
        raise ConfigError(
            f"{r.where}: mm_projector_type = {name!r} is not implemented",
            hint="implemented: linear, identity, mlp{N}x_gelu, mlp{N}x_res{R}x_gelu, pooler",
        )
    return int(match[1] or 1), int(match[2] or 0)
