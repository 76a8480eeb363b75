"""A trained tower for images of another size: what depends on the grid of patches is resampled."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from edgevlm.toolkit.errors import ConfigError
from edgevlm.training.towers.tower import Tower


def resized(tower: Tower, image_size: int, *, as_original: bool = False) -> Tower:
    """A copy of a tower for square images of `image_size` pixels, to be trained on.

    CLIP: positions by bicubic interpolation, the class token's as it is (open_clip's way; how MLCD
    went from 224 to 336 is not published). MLCD: nothing depends on the grid. UNICOM (deepglint/
    unicom, its fine-tuning at 512): positions by bilinear interpolation with aligned corners, and
    the head's first matrix likewise, scaled so that sums over more tokens stay the same.
    as_original: that matrix as the original resamples it, which mixes up its axes; a start for
    training only. Raises ConfigError for a size below one patch.
    """
    c = tower.config
    if image_size < c.patch_size:
        raise ConfigError(f"images of {image_size} pixels have no patch of {c.patch_size}")
    size = (image_size, image_size) if tower.kind == "mlcd" else image_size
    grown = Tower(
        tower.kind,
        replace(c, image_size=size),
        drop_path=tower.drop_path,
        recompute=tower.recompute,
    )
    grid = image_size // c.patch_size
    state = dict(tower.state_dict())
    if tower.kind == "clip":
        table = state["position"]
        state["position"] = torch.cat([table[:1], _on_grid(table[1:], grid, "bicubic")])
    elif tower.kind == "unicom":
        state["position"] = _on_grid(state["position"], grid, "bilinear")
        resample = _scrambled if as_original else _matrix
        state["feature.0.weight"] = resample(state["feature.0.weight"], c.patches, grid)
    grown.load_state_dict(state)
    return grown.train(tower.training)


def _on_grid(table: Tensor, grid: int, mode: str) -> Tensor:
    """[g * g, D] -> [grid * grid, D]."""
    side = math.isqrt(len(table))
    return _zoom(table.reshape(side, side, -1), grid, mode).reshape(grid * grid, -1)


def _zoom(table: Tensor, grid: int, mode: str) -> Tensor:
    """[g, g, D] -> [grid, grid, D]; bilinear with aligned corners, bicubic with antialiasing."""
    image = table.permute(2, 0, 1)[None]
    bilinear = mode == "bilinear"
    zoomed = F.interpolate(
        image, (grid, grid), mode=mode, align_corners=bilinear, antialias=not bilinear
    )
    return zoomed[0].permute(1, 2, 0)


def _matrix(weight: Tensor, patches: int, grid: int) -> Tensor:
    """The head's first matrix [out, g * g * D], each output's weights as an image."""
    outputs, side = len(weight), math.isqrt(patches)
    image = weight.reshape(outputs, side, side, -1).permute(1, 2, 0, 3)
    zoomed = _zoom(image.reshape(side, side, -1), grid, "bilinear")
    moved = zoomed.reshape(grid * grid, outputs, -1).permute(1, 0, 2).reshape(outputs, -1)
    return moved * (patches / grid**2)


def _scrambled(weight: Tensor, patches: int, grid: int) -> Tensor:
    """As deepglint/unicom does it: the axis of outputs is taken for the grid's rows."""
    outputs, side = len(weight), math.isqrt(patches)
    zoomed = _zoom(weight.reshape(side, side, -1), grid, "bilinear")
    return zoomed.reshape(-1, outputs).T.contiguous()
