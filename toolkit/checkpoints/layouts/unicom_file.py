"""Weight files of UNICOM (deepglint/unicom): state dicts whose shapes state all sizes but heads."""

from __future__ import annotations

import math
import re

from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.encoders import unicom

HEADS = {768: 12, 1024: 16}  # of every published file: 64 channels each
_PATCHES = "patch_embed.proj.weight"
# What training programs put in front of names: retrieval.py, torch.compile, DataParallel.
_PREFIX = re.compile(r"((?:model|_orig_mod|module)\.)*")


def prefix_in(checkpoint: Checkpoint) -> str | None:
    """What stands before the names of a UNICOM's tensors; None if the file holds none."""
    found = [key.removesuffix(_PATCHES) for key in checkpoint.keys() if key.endswith(_PATCHES)]  # noqa: SIM118
    return next((prefix for prefix in found if _PREFIX.fullmatch(prefix)), None)


def config_of(checkpoint: Checkpoint, prefix: str, heads: int | None = None) -> unicom.Config:
    """The sizes of a UNICOM's tensors.

    heads: of attention, where the width is of no published file. Raises CheckpointError for tensors
    that fit no UNICOM, ConfigError where the heads are not known or cannot be.
    """
    for name in (_PATCHES, "pos_embed", "feature.0.weight", "feature.2.weight"):
        if prefix + name not in checkpoint:
            raise _not_one(checkpoint, prefix, f"it lacks {prefix + name}")
    patches = checkpoint.shape(prefix + _PATCHES)
    positions = checkpoint.shape(f"{prefix}pos_embed")
    if len(patches) != 4 or len(positions) != 3:
        raise _not_one(checkpoint, prefix, f"{_PATCHES} is {patches}, pos_embed {positions}")
    hidden, side = patches[0], math.isqrt(positions[1])
    if side * side != positions[1]:
        raise _not_one(
            checkpoint, prefix, f"pos_embed has {positions[1]} positions, no square of patches"
        )
    start = f"{prefix}blocks."
    inside = [key.removeprefix(start) for key in checkpoint.keys() if key.startswith(start)]  # noqa: SIM118
    numbers = {name.split(".")[0] for name in inside}
    config = unicom.Config(
        hidden_size=hidden,
        num_layers=len(numbers),
        num_heads=_heads(checkpoint.where, hidden, heads),
        patch_size=patches[2],
        image_size=side * patches[2],
        embedding_dim=checkpoint.shape(f"{prefix}feature.2.weight")[0],
    )
    check(config, checkpoint, prefix)
    return config


def check(config: unicom.Config, checkpoint: Checkpoint, prefix: str) -> None:
    """Raise CheckpointError for the first tensor that is missing or of another shape."""
    for name, expected in unicom.stored_shapes(config).items():
        if prefix + name not in checkpoint:
            raise _not_one(checkpoint, prefix, f"it lacks {prefix + name}")
        shape = checkpoint.shape(prefix + name)
        if shape != expected:
            raise _not_one(checkpoint, prefix, f"{prefix + name} is {shape}, expected {expected}")


def _heads(where: str, hidden: int, given: int | None) -> int:
    known = HEADS.get(hidden)
    if given is None and known is None:
        raise ConfigError(
            f"{where} has {hidden} channels, and does not say how many heads",
            hint=f"say it: --heads {max(hidden // 64, 1)} if a head has 64 channels, as all "
            "published ones have",
        )
    count = given or known or 1
    if count < 1 or hidden % count:
        raise ConfigError(f"--heads {count} does not divide the {hidden} channels of {where}")
    return count


def _not_one(checkpoint: Checkpoint, prefix: str, fault: str) -> CheckpointError:
    running = "running_" in fault
    hint = (
        "batch norms need their running statistics: save the whole state_dict, buffers too"
        if running
        else "a file of deepglint/unicom has patch_embed, pos_embed, blocks, norm, feature.0 to 3"
    )
    return CheckpointError(f"{checkpoint.where} is almost a UNICOM, but {fault}", hint=hint)
