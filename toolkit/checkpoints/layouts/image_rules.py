"""How the originals make views and tokens: image_aspect_ratio and mm_patch_merge_type."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.preprocess import ImageRules, Preprocess, check_tiles
from edgevlm.toolkit.images.tiling import Size, Tiling, TokenArrangement
from edgevlm.toolkit.strict import Reader
from edgevlm.toolkit.vlm.config import ComponentConfig

_SIDES = (224, 336, 384, 448, 512)


def read_rules(
    r: Reader,
    encoder: ComponentConfig,
    merger: ComponentConfig,
    rule: Preprocess,
    *,
    lone_newline: bool,
) -> ImageRules:
    """The image rules of a LLaVA configuration; image_aspect_ratio is "square" if it is missing.

    lone_newline: whether the newline token of "unpad" follows an image without tiles. Raises
    ConfigError.
    """
    aspect = r.take("image_aspect_ratio", str, "square")
    merge = r.take("mm_patch_merge_type", str, "flat")
    pinpoints = r.raw("image_grid_pinpoints")
    match = re.fullmatch(r"anyres(?:_max_(\d+))?", str(aspect))
    if aspect not in ("square", "pad") and not match:
        raise ConfigError(
            f"{r.where}: image_aspect_ratio = {aspect!r} is not implemented",
            hint="implemented: square, pad, anyres, anyres_max_N",
        )
    preprocess = rule.padded() if aspect == "pad" else rule
    max_tiles = int(match[1] or 0) if match else 0
    arrangement = read_arrangement(r, merge, _side(encoder, merger), max_tiles)
    tiling = None
    if match:
        check_tiles(rule, r.where)
        side = rule.size[0]
        tiling = Tiling(read_pinpoints(pinpoints, side, r.where), side, base=rule.short_edge)
    elif arrangement is not None and not (arrangement.newline and lone_newline):
        arrangement = None  # a single view without a newline: its tokens in their own order
    if arrangement is not None and arrangement.side == 0:
        raise ConfigError(f"{r.where}: {merge} needs a tower with a fixed grid of patches only")
    return ImageRules({encoder.name: preprocess}, tiling, arrangement)


def _side(encoder: ComponentConfig, merger: ComponentConfig) -> int:
    """Tokens per row of a view after the merger; 0 if they are no square of patches."""
    tokens = encoder.config.tokens
    side = math.isqrt(tokens) if isinstance(tokens, int) else 0
    if side * side != tokens:
        return 0
    return side // 2 if merger.kind == "pooler" else side


def read_arrangement(r: Reader, merge: str, side: int, max_tiles: int) -> TokenArrangement | None:
    """The token arrangement that a merge type names; None if flat: view after view.

    max_tiles: the N of anyres_max_N, 0 if there is none. Raises ConfigError for another type.
    """
    if merge == "flat":
        return None
    words = merge.split("_")
    if words[0] != "spatial" or not set(words[1:]) <= {"unpad", "maxpool2x2", "nobase"}:
        raise ConfigError(
            f"{r.where}: mm_patch_merge_type = {merge!r} is not implemented",
            hint="implemented: flat, spatial, with any of _unpad, _maxpool2x2, _nobase",
        )
    pool = "maxpool2x2" in words
    unpad = "unpad" in words
    return TokenArrangement(
        side,
        "spatial",
        unpad=unpad and not pool,
        newline=unpad,
        base="nobase" not in words,
        pool=pool,
        max_tiles=max_tiles if unpad and not pool else 0,
    )


def read_pinpoints(raw: Any, side: int, where: str) -> tuple[Size, ...]:
    """image_grid_pinpoints in pixels: a list of [width, height], that list as text, or
    "(1x1),...,(6x6)" in tiles. Raises ConfigError unless they are multiples of the tile.
    """
    if isinstance(raw, str):
        raw = _from_range(raw, side, where) if "x" in raw else _literal(raw, where)
    sizes = read_pairs(raw, where)
    if any(w % side or h % side for w, h in sizes):
        raise ConfigError(
            f"{where}: image_grid_pinpoints {list(sizes)} are not multiples of the tile {side}"
        )
    return sizes


def read_pairs(raw: Any, where: str) -> tuple[Size, ...]:
    """A list of pairs of pixels. Raises ConfigError for anything else."""
    entries = raw if isinstance(raw, (list, tuple)) else []
    pairs = [p for p in entries if isinstance(p, (list, tuple)) and len(p) == 2]
    sides = [side for pair in pairs for side in pair]
    if (
        not pairs
        or len(pairs) != len(entries)
        or any(type(side) is not int or side < 1 for side in sides)
    ):
        stated = "null" if raw is None else repr(raw)
        raise ConfigError(
            f"{where}: image_grid_pinpoints = {stated[:200]} is no list of resolutions",
            hint="a list of [width, height] in pixels, such as [[336, 672], [672, 336]]",
        )
    return tuple((a, b) for a, b in pairs)


def _literal(text: str, where: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ConfigError(f"{where}: image_grid_pinpoints = {text!r} cannot be read") from None


def _from_range(text: str, side: int, where: str) -> list[Size]:
    """(1x1),...,(2x3): every grid between the first and the last, times the tile's side."""
    grids = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", text)]
    if not grids or side not in _SIDES:
        raise ConfigError(
            f"{where}: image_grid_pinpoints = {text!r} cannot be read for tiles of {side}",
            hint=f"a range such as (1x1),...,(6x6), with a tile of {_SIDES}",
        )
    (a, b), (c, d) = grids[0], grids[-1]
    return [(i * side, j * side) for i in range(a, c + 1) for j in range(b, d + 1)]
