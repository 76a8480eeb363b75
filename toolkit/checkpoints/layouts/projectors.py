"""LLaVA's projectors by name: linear, identity, mlp{N}x_gelu, mlp{N}x_res{R}x_gelu, pooler."""

from __future__ import annotations

import math
import re

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.models.mergers import mlp, pooler
from edgevlm.toolkit.strict import MOST_LAYERS, Reader
from edgevlm.toolkit.vlm.config import ComponentConfig

_NAMES = r"linear|mlp([0-9]{1,4})x(?:_res([0-9]{1,4})x)?_gelu"


def linears(r: Reader, encoder: ComponentConfig, outputs: int) -> ComponentConfig:
    """The projector that config.json names, for one encoder and a language model of `outputs`."""
    name, inputs = read_name(r, encoder), encoder.config.hidden_sizes
    if name == "pooler":
        side = math.isqrt(encoder.config.tokens)
        return ComponentConfig("merger", "pooler", pooler.Config(sum(inputs), outputs, side))
    layers, blocks = depth(r, name)
    check_identity(r, layers, sum(inputs), outputs)
    return ComponentConfig("merger", "mlp", mlp.Config(inputs, outputs, layers, blocks=blocks))


def check_identity(r: Reader, layers: int, inputs: int, outputs: int) -> None:
    """Raise ConfigError if a projector without linears has different input and output channels."""
    if layers == 0 and inputs != outputs:
        raise ConfigError(
            f"{r.where}: an identity projector joins {inputs} channels to the language "
            f"model's {outputs}",
            hint="the tower or the language model belongs to another checkpoint",
        )


def read_name(r: Reader, encoder: ComponentConfig) -> str:
    """mm_projector_type. Raises ConfigError if mm_hidden_size is not what the encoder gives."""
    channels, stated = sum(encoder.config.hidden_sizes), r.count("mm_hidden_size")
    if stated not in (channels, encoder.config.hidden_sizes[0]):
        raise ConfigError(
            f"{r.where}: mm_hidden_size = {stated}, the tower gives {channels}",
            hint="the tower belongs to another model, or the select layer does",
        )
    if r.given("mm_projector_type") and not r.raw("mm_projector_type"):
        raise ConfigError(
            f"{r.where}: mm_projector_type = {r.raw('mm_projector_type')!r} names no projector",
            hint="drop the key if the projector is a single linear; else name it, as mlp2x_gelu",
        )
    return r.take("mm_projector_type", str, "linear")


def depth(r: Reader, name: str) -> tuple[int, int]:
    """The number of linears and of residual blocks of a projector type. Raises ConfigError."""
    if name == "identity":
        return 0, 0
    match = re.fullmatch(_NAMES, name)
    if match is None or match[1] == "0" or max(int(n or 0) for n in match.groups()) > MOST_LAYERS:
        raise ConfigError(
            f"{r.where}: mm_projector_type = {name!r} is not implemented",
            hint="implemented: linear, identity, mlp{N}x_gelu, mlp{N}x_res{R}x_gelu, pooler",
        )
    return int(match[1] or 1), int(match[2] or 0)
