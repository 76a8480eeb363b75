"""AnyRes: an image as several views, and the order in which their tokens enter the prompt.

An image is scaled into the best of several resolutions and cut into tiles; a view of the whole
image comes first. Arranging tokens is index arithmetic: every token is a feature row. Only pooling
and bilinear shrinking compute anything, and they too are described by rows and weights.
Source: haotian-liu/LLaVA 1.6, LLaVA-VL/LLaVA-NeXT, deepglint/unicom; transformers' llava_next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.ops.vocabulary import Array

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # (width, height)
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


@dataclass(frozen=True)
class Tiling:
    """pinpoints: allowed resolutions as (width, height), multiples of `tile`.

    several: how a question with more than one image shows each: as tiles, or as one padded view.
    base: side of the whole image's view, None if it is `tile`. resample: the filter that makes the
    views; the originals always take bicubic, transformers' processors their own.
    """

    pinpoints: tuple[Size, ...]
    tile: int
    several: Literal["tile", "pad"] = "tile"
    base: int | None = None
    resample: Resample = "bicubic"

    def limited(self, tiles: int) -> Tiling:
        """The same with only the resolutions of at most `tiles` tiles. ConfigError if none is."""
        counts = {p: (p[0] // self.tile) * (p[1] // self.tile) for p in self.pinpoints}
        kept = tuple(p for p in self.pinpoints if counts[p] <= tiles)
        if not kept:
            raise ConfigError(
                f"{tiles} tiles are too few: the model's smallest resolution takes "
                f"{min(counts.values())}",
                hint=f"allow {min(counts.values())} tiles or more",
            )
        return replace(self, pinpoints=kept)


@dataclass(frozen=True)
class TokenArrangement:
    """The order of the views' tokens; side: tokens per row of a view.

    order: "flat", view after view, or "spatial", the base view and then the tiles as one map.
    The other fields concern the map. unpad: drop rows or columns of padding. newline: end every
    row with the learned token, and a single view too. pool: take the maximum of 2 x 2 tokens (rows
    then have no newline). max_tiles: shrink bilinearly to about that many tiles (anyres_max_N), 0
    for no limit. base: whether the base view precedes the map. rounded: round lengths to 7 digits,
    as transformers does.
    """

    side: int
    order: Literal["flat", "spatial"] = "flat"
    unpad: bool = False
    newline: bool = False
    base: bool = True
    pool: bool = False
    max_tiles: int = 0
    rounded: bool = False

    @property
    def computes(self) -> bool:
        """Whether tokens are computed from several rows, not only reordered."""
        return self.pool or self.max_tiles > 0


@dataclass(frozen=True)
class Views:
    """The views of an image, and the grid (columns, rows) of its tiles; None for a single view."""

    images: tuple[Image, ...]
    grid: Size | None


@dataclass(frozen=True)
class ArrangedTokens:
    """The tokens of an image as combinations of feature rows.

    rows int64 and weights float32, both [tokens, 4]: token i is the sum of the feature rows
    rows[i, :] weighted by weights[i, :], or their maximum.
    """

    rows: Array
    weights: Array


# -- views -------------------------------------------------------------------------------------


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that keeps most of the image's pixels; ties go to the least waste."""
    width, height = size
    best, most, least = pinpoints[0], -1, 0
    for columns, rows in pinpoints:
        scale = min(columns / width, rows / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        waste = columns * rows - used
        if used > most or (used == most and waste < least):
            best, most, least = (columns, rows), used, waste
    return best


def cut(image: Image, tiling: Tiling) -> Views:
    """A view of the whole image, its aspect ignored, then the tiles of it row by row."""
    columns, rows = best_resolution(image.size, tiling.pinpoints)
    resample = pillow_filter(tiling.resample)
    fitted = _fit(image, (columns, rows), resample)
    side = tiling.tile
    tiles = [
        fitted.crop((x, y, x + side, y + side))
        for y in range(0, rows, side)
        for x in range(0, columns, side)
    ]
    whole = tiling.base or side
    base = image.resize((whole, whole), resample)
    return Views((base, *tiles), (columns // side, rows // side))


def _fit(image: Image, target: Size, resample: int) -> Image:
    """The image scaled into `target`, in the centre of black."""
    from PIL import Image

    (width, height), (columns, rows) = image.size, target
    if columns / width < rows / height:
        size = (columns, min(math.ceil(height * (columns / width)), rows))
    else:
        size = (min(math.ceil(width * (rows / height)), columns), rows)
    canvas = Image.new("RGB", target, (0, 0, 0))
    corner = ((columns - size[0]) // 2, (rows - size[1]) // 2)
    canvas.paste(image.resize(size, resample), corner)
    return canvas


def pillow_filter(name: Resample) -> int:
    """Pillow's number of a filter."""
    from PIL import Image

    return Image.Resampling[name.upper()]


# -- tokens ------------------------------------------------------------------------------------


def arrange(order: TokenArrangement, views: int, grid: Size | None, size: Size) -> ArrangedTokens:
    """The tokens of an image of `views` views; size: the image's (width, height).

    Feature rows: view after view, side^2 each, then the newline token if there is one.
    """
    each = order.side**2
    newline = views * each
    if order.order == "flat":
        return _plain(np.arange(newline))
    if grid is None or views == 1:
        single = np.arange(each)
        return _plain(np.append(single, newline) if order.newline else single)
    tiles = _map(order, grid, size)
    if order.newline and not order.pool:
        ends = np.full((tiles.rows.shape[0], 1, 4), newline)
        tiles = ArrangedTokens(
            np.concatenate([tiles.rows, ends], 1),
            np.concatenate([tiles.weights, _first(ends.shape)], 1),
        )
    flat = ArrangedTokens(tiles.rows.reshape(-1, 4), tiles.weights.reshape(-1, 4))
    if not order.base:
        return flat
    base = _plain(np.arange(each))
    return ArrangedTokens(
        np.concatenate([base.rows, flat.rows]), np.concatenate([base.weights, flat.weights])
    )


def _plain(rows: Array) -> ArrangedTokens:
    """Each token is one row, repeated four times so that a maximum gives the same."""
    repeated = np.repeat(rows[:, None], 4, 1)
    return ArrangedTokens(repeated, _first(repeated.shape))


def _first(shape: tuple[int, ...]) -> Array:
    weights = np.zeros(shape, np.float32)
    weights[..., 0] = 1
    return weights


def _map(order: TokenArrangement, grid: Size, size: Size) -> ArrangedTokens:
    """The tiles' tokens as one map [rows, columns, 4], cropped, pooled or shrunk."""
    n, (columns, rows) = order.side, grid
    tile, y, x = (np.arange(count) for count in (rows * columns, n, n))
    index = (1 + tile[:, None, None]) * n * n + y[None, :, None] * n + x
    index = index.reshape(rows, columns, n, n).transpose(0, 2, 1, 3).reshape(rows * n, -1)
    if order.unpad:
        index = _unpad(index, size, rounded=order.rounded)
    if order.pool:
        return _pooled(index)
    if order.max_tiles:
        ratio = math.sqrt(index.shape[0] * index.shape[1] / (order.max_tiles * n * n))
        if ratio > 1.1:
            return _shrunk(index, (int(index.shape[0] // ratio), int(index.shape[1] // ratio)))
    repeated = np.repeat(index[..., None], 4, 2)
    return ArrangedTokens(repeated, _first(repeated.shape))


def _unpad(index: Array, size: Size, *, rounded: bool) -> Array:
    """Remove the rows or columns that show padding; an odd number of them leaves one more."""
    width, height = size
    rows, columns = index.shape

    def length(value: float) -> int:
        return int(round(value, 7) if rounded else value)

    if width / height > columns / rows:
        padding = (rows - length(height * (columns / width))) // 2
        return index[padding : rows - padding]
    padding = (columns - length(width * (rows / height))) // 2
    return index[:, padding : columns - padding]


def _pooled(index: Array) -> ArrangedTokens:
    rows, columns = (n // 2 for n in index.shape)
    blocks = index[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    flat = blocks.transpose(0, 2, 1, 3).reshape(rows, columns, 4)
    return ArrangedTokens(flat, _first(flat.shape))


def _shrunk(index: Array, size: tuple[int, int]) -> ArrangedTokens:
    """Bilinear resizing to `size` (rows, columns), align_corners off, no antialias."""
    y, x = (_neighbours(before, after) for before, after in zip(index.shape, size, strict=True))
    rows = np.stack([index[np.ix_(y[a], x[b])] for a in (0, 1) for b in (0, 1)], -1)
    far = y[2][:, None], x[2][None, :]
    near = 1 - far[0], 1 - far[1]
    weights = [near[0] * near[1], near[0] * far[1], far[0] * near[1], far[0] * far[1]]
    return ArrangedTokens(rows, np.stack(weights, -1).astype(np.float32))


def _neighbours(before: int, after: int) -> tuple[Array, Array, Array]:
    """Lower and upper index for each output position, and the weight of the upper one."""
    points = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0)
    low = np.minimum(points.astype(np.int64), before - 1)
    return low, np.minimum(low + 1, before - 1), points - low
