"""AnyRes: a image as several views, and the order in which their tokens enter the prompt.

A image is fitted into the best of several resolutions and cut into tiles, with the whole image
in front. Arranging tokens is index arithmetic: which feature row stands where. Only pooling and
bilinear shrinking compute anything, and they too are described by rows and weights.
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


@dataclass(frozen=True)
class Tiling:
    """pinpoints: allowed resolutions as (width, height), multiples of `tile`.

    several: what a question with more than one image makes of each: tiles, or one padded view.
    base: side of the squashed whole image, if the processor resizes to another than it crops.
    """

    pinpoints: tuple[Size, ...]
    tile: int
    several: Literal["tile", "pad"] = "tile"
    base: int | None = None

    def limited(self, tiles: int) -> Tiling:
        """The same with the resolutions of at most `tiles` tiles. Raises ConfigError if none is."""
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
    """How the views' tokens follow each other; side: tokens per row of a view.

    order: "flat" view after view, or "spatial": the base view, then the tiles as one map. Of the
    map: unpad removes the padding's rows or columns, newline ends every row with the learned
    token (and a lone view), pool takes the maximum of 2 x 2 tokens (its rows have no newline),
    max_tiles > 0 shrinks it bilinearly to about that many tiles (anyres_max_N). base: whether the
    base view stands in front. rounded: lengths are rounded to 7 digits first, as transformers does.
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
        """Whether tokens are mixed, not only placed."""
        return self.pool or self.max_tiles > 0


@dataclass(frozen=True)
class Views:
    """A image's views, and the grid (columns, rows) of its tiles; None for a lone view."""

    images: tuple[Image, ...]
    grid: Size | None


@dataclass(frozen=True)
class ArrangedTokens:
    """Token i of a image mixes feature rows[i, :] by weights[i, :], or takes their maximum."""

    rows: Array
    weights: Array


# -- views -------------------------------------------------------------------------------------


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that keeps most of the image's pixels; ties go to the least waste."""
    width, height = size
    best, most, least = pinpoints[0], -1, 0
    for wide, tall in pinpoints:
        scale = min(wide / width, tall / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        waste = wide * tall - used
        if used > most or (used == most and waste < least):
            best, most, least = (wide, tall), used, waste
    return best


def cut(image: Image, tiling: Tiling) -> Views:
    """The squashed whole image, then tiles row by row of it fitted onto black."""
    wide, tall = best_resolution(image.size, tiling.pinpoints)
    fitted = _fit(image, (wide, tall))
    side = tiling.tile
    tiles = [
        fitted.crop((x, y, x + side, y + side))
        for y in range(0, tall, side)
        for x in range(0, wide, side)
    ]
    whole = tiling.base or side
    base = image.resize((whole, whole), _bicubic())
    return Views((base, *tiles), (wide // side, tall // side))


def _fit(image: Image, target: Size) -> Image:
    from PIL import Image

    (width, height), (wide, tall) = image.size, target
    if wide / width < tall / height:
        size = (wide, min(math.ceil(height * (wide / width)), tall))
    else:
        size = (min(math.ceil(width * (tall / height)), wide), tall)
    canvas = Image.new("RGB", target, (0, 0, 0))
    place = ((wide - size[0]) // 2, (tall - size[1]) // 2)
    canvas.paste(image.resize(size, _bicubic()), place)
    return canvas


def _bicubic() -> int:
    from PIL import Image

    return Image.Resampling.BICUBIC


# -- tokens ------------------------------------------------------------------------------------


def arrange(layout: TokenArrangement, views: int, grid: Size | None, size: Size) -> ArrangedTokens:
    """Where the tokens of a image's `views` go; size: the image's (width, height).

    Feature rows: view after view, side^2 each, then the newline token if the layout has one.
    """
    each = layout.side**2
    newline = views * each
    if layout.order == "flat":
        return _plain(np.arange(newline))
    if grid is None or views == 1:
        lone = np.arange(each)
        return _plain(np.append(lone, newline) if layout.newline else lone)
    found = _map(layout, grid, size)
    if layout.newline and not layout.pool:
        ends = np.full((found.rows.shape[0], 1, 4), newline)
        found = ArrangedTokens(
            np.concatenate([found.rows, ends], 1),
            np.concatenate([found.weights, _first(ends.shape)], 1),
        )
    flat = ArrangedTokens(found.rows.reshape(-1, 4), found.weights.reshape(-1, 4))
    if not layout.base:
        return flat
    base = _plain(np.arange(each))
    return ArrangedTokens(
        np.concatenate([base.rows, flat.rows]), np.concatenate([base.weights, flat.weights])
    )


def _plain(rows: Array) -> ArrangedTokens:
    """Each token is one row: repeated, so that a maximum works too."""
    repeated = np.repeat(rows[:, None], 4, 1)
    return ArrangedTokens(repeated, _first(repeated.shape))


def _first(shape: tuple[int, ...]) -> Array:
    weights = np.zeros(shape, np.float32)
    weights[..., 0] = 1
    return weights


def _map(layout: TokenArrangement, grid: Size, size: Size) -> ArrangedTokens:
    """The tiles' tokens as one map [rows, columns, 4], cropped, pooled or shrunk."""
    n, (columns, rows) = layout.side, grid
    tile, y, x = (np.arange(count) for count in (rows * columns, n, n))
    index = (1 + tile[:, None, None]) * n * n + y[None, :, None] * n + x
    index = index.reshape(rows, columns, n, n).transpose(0, 2, 1, 3).reshape(rows * n, -1)
    if layout.unpad:
        index = _unpad(index, size, rounded=layout.rounded)
    if layout.pool:
        return _pooled(index)
    if layout.max_tiles:
        ratio = math.sqrt(index.shape[0] * index.shape[1] / (layout.max_tiles * n * n))
        if ratio > 1.1:
            return _shrunk(index, (int(index.shape[0] // ratio), int(index.shape[1] // ratio)))
    repeated = np.repeat(index[..., None], 4, 2)
    return ArrangedTokens(repeated, _first(repeated.shape))


def _unpad(index: Array, size: Size, *, rounded: bool) -> Array:
    """Remove the rows or columns that show padding; an odd rest keeps one more."""
    width, height = size
    tall, wide = index.shape

    def length(value: float) -> int:
        return int(round(value, 7) if rounded else value)

    if width / height > wide / tall:
        cut_off = (tall - length(height * (wide / width))) // 2
        return index[cut_off : tall - cut_off]
    cut_off = (wide - length(width * (tall / height))) // 2
    return index[:, cut_off : wide - cut_off]


def _pooled(index: Array) -> ArrangedTokens:
    rows, columns = (n // 2 for n in index.shape)
    blocks = index[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2)
    flat = blocks.transpose(0, 2, 1, 3).reshape(rows, columns, 4)
    return ArrangedTokens(flat, _first(flat.shape))


def _shrunk(index: Array, size: tuple[int, int]) -> ArrangedTokens:
    """Bilinear resizing to `size` (rows, columns), align_corners off, no antialias."""
    y, x = (_neighbours(have, wanted) for have, wanted in zip(index.shape, size, strict=True))
    rows = np.stack([index[np.ix_(y[a], x[b])] for a in (0, 1) for b in (0, 1)], -1)
    far = y[2][:, None], x[2][None, :]
    near = 1 - far[0], 1 - far[1]
    weights = [near[0] * near[1], near[0] * far[1], far[0] * near[1], far[0] * far[1]]
    return ArrangedTokens(rows, np.stack(weights, -1).astype(np.float32))


def _neighbours(have: int, wanted: int) -> tuple[Array, Array, Array]:
    """Lower and upper index for each output position, and the upper one's share."""
    places = np.maximum((np.arange(wanted) + 0.5) * (have / wanted) - 0.5, 0)
    low = np.minimum(places.astype(np.int64), have - 1)
    return low, np.minimum(low + 1, have - 1), places - low
