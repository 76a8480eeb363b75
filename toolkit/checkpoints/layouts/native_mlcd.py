"""Weight files of MLCD (deepglint/unicom) in the training code's own names: towers with RoPE2D.

Their tensors state every size but that of images, which positions do not depend on: it comes from
the preprocessor_config.json beside the file.
"""

from __future__ import annotations

import re

from edgevlm.toolkit.checkpoints.weights import Checkpoint
from edgevlm.toolkit.errors import CheckpointError, ConfigError
from edgevlm.toolkit.models.encoders import mlcd

_PATCHES, _ANGLES = "conv1.weight", "class_pos_emb"
_PREFIX = re.compile(r"((?:model|_orig_mod|module)\.)*")  # torch.compile, DataParallel
# Old files hold both; the original drops them when it loads one.
UNUSED = ("positional_embedding", "proj")


def prefix_in(checkpoint: Checkpoint) -> str | None:
    """What stands before the names of an MLCD's tensors; None if the file holds none."""
    found = [key.removesuffix(_PATCHES) for key in checkpoint.keys() if key.endswith(_PATCHES)]  # noqa: SIM118
    return next((prefix for prefix in found if _PREFIX.fullmatch(prefix)), None)


def config_of(checkpoint: Checkpoint, prefix: str, size: tuple[int, int]) -> mlcd.Config:
    """The sizes of an MLCD's tensors; size: (height, width) of its images.

    Raises CheckpointError for tensors that fit no MLCD, ConfigError for images that are not made of
    its patches.
    """
    first = f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"
    for name in (prefix + _PATCHES, prefix + _ANGLES, first):
        if name not in checkpoint:
            raise _not_one(checkpoint, f"it lacks {name}")
    patches, angles = (checkpoint.shape(prefix + name) for name in (_PATCHES, _ANGLES))
    wide = checkpoint.shape(first)
    if len(patches) != 4 or len(angles) != 2 or len(wide) != 2 or patches[2] != patches[3]:
        raise _not_one(checkpoint, f"{_PATCHES} is {patches}, {_ANGLES} {angles}")
    hidden, patch, head = patches[0], patches[2], 2 * angles[1]
    if hidden % head or head % 4:
        raise _not_one(
            checkpoint, f"{_ANGLES} is of heads of {head} channels, it has {hidden} channels"
        )
    if any(side % patch for side in size):
        raise ConfigError(
            f"preprocessor_config.json beside {checkpoint.where} makes images of {size}, which are "
            f"not made of its patches of {patch} pixels",
            hint="take the one of the same tower",
        )
    start = f"{prefix}transformer.resblocks."
    inside = [key.removeprefix(start) for key in checkpoint.keys() if key.startswith(start)]  # noqa: SIM118
    return mlcd.Config(
        hidden_size=hidden,
        num_layers=len({name.split(".")[0] for name in inside}),
        num_heads=hidden // head,
        intermediate_size=wide[0],
        patch_size=patch,
        image_size=size,
    )


def _not_one(checkpoint: Checkpoint, fault: str) -> CheckpointError:
    learned = "positional_embedding" in fault or _ANGLES in fault
    return CheckpointError(
        f"{checkpoint.where} is almost an MLCD in its native names, but {fault}",
        hint="towers with learned positions (CLIP, MLCD's two smaller ones): take the folder that "
        "Hugging Face's transformers reads"
        if learned
        else "save the whole state dict of the tower",
    )
