"""AnyRes: views and token order against transformers and the original's rules in torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from edgevlm.toolkit.images.preprocess import Preprocess, preprocess
from edgevlm.toolkit.images.tiling import (
    Size,
    Tiling,
    TokenArrangement,
    arrange,
    best_resolution,
    cut,
)
from edgevlm.toolkit.ops.vocabulary import Array
from tests.toolkit.images.test_preprocess import CLIP_MEAN, CLIP_STD, noise

theirs_next: Any = modeling_llava_next
TILE = 28
PUBLISHED = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
MANY = tuple((i, j) for i in range(1, 7) for j in range(1, 7))
SIDE = st.integers(2, 3000)
modest = settings(deadline=None, max_examples=150, derandomize=True)


def pinpoints(grids: tuple[Size, ...], tile: int) -> tuple[Size, ...]:
    return tuple((a * tile, b * tile) for a, b in grids)


def flipped(points: tuple[Size, ...]) -> list[list[int]]:
    """transformers has (height, width)."""
    return [[h, w] for w, h in points]


@modest
@given(SIDE, SIDE, st.sampled_from([PUBLISHED, MANY]), st.sampled_from([28, 336, 384]))
@example(2000, 10, MANY, 336)
@example(2, 400, PUBLISHED, 28)
@example(336, 336, PUBLISHED, 336)
def test_the_best_resolution(width: int, height: int, grids: tuple[Size, ...], tile: int) -> None:
    points = pinpoints(grids, tile)
    rows, columns = select_best_resolution((height, width), flipped(points))
    assert best_resolution((width, height), points) == (columns, rows)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(2, 160), st.integers(2, 160), st.sampled_from([PUBLISHED, MANY]))
@example(200, 1, PUBLISHED)
@example(2, 160, MANY)
def test_views_are_those_of_transformers(width: int, height: int, grids: tuple[Size, ...]) -> None:
    points, image = pinpoints(grids, TILE), noise(width, height)
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=flipped(points),
    )(image, return_tensors="np")["pixel_values"][0]
    rule = Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, short_edge=TILE, crop=(TILE, TILE))
    views = cut(image, Tiling(points, TILE))
    found = np.stack([preprocess(view, rule) for view in views.images])
    assert views.grid is not None
    assert len(found) == 1 + views.grid[0] * views.grid[1]
    np.testing.assert_array_equal(found, theirs)


def test_the_views_of_an_image_by_hand() -> None:
    """Half red, half blue on two tiles side by side; the base view holds both."""
    image = Image.new("RGB", (56, 28), "red")
    image.paste("blue", (28, 0, 56, 28))
    views = cut(image, Tiling(((56, 28),), 28))
    base, left, right = (np.asarray(view) for view in views.images)
    assert views.grid == (2, 1)
    assert (left == (255, 0, 0)).all()
    assert (right == (0, 0, 255)).all()
    assert (base[0, 0] == (255, 0, 0)).all()
    assert (base[0, -1] == (0, 0, 255)).all()


# -- the order of tokens -------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """The original's mm_patch_merge_type and anyres_max_N."""

    kind: str
    most: int = 0

    def arrangement(self, side: int, *, rounded: bool = False) -> TokenArrangement:
        """The same as a TokenArrangement."""
        if self.kind == "flat":
            return TokenArrangement(side)
        return TokenArrangement(
            side,
            "spatial",
            unpad="unpad" in self.kind and "maxpool" not in self.kind,
            newline="unpad" in self.kind,
            base="nobase" not in self.kind,
            pool="maxpool2x2" in self.kind,
            max_tiles=self.most,
            rounded=rounded,
        )


MERGES = [
    Merge("flat"),
    Merge("spatial"),
    Merge("spatial_unpad"),
    Merge("spatial_unpad_nobase"),
    Merge("spatial_nobase"),
    Merge("spatial_maxpool2x2"),
    Merge("spatial_unpad_maxpool2x2"),
    Merge("spatial_unpad", 1),
    Merge("spatial_unpad", 4),
    Merge("spatial_unpad", 9),
    Merge("spatial_unpad_nobase", 2),
]


def merged(
    merge: Merge, views: torch.Tensor, newline: torch.Tensor, grid: Size, size: Size
) -> torch.Tensor:
    """The original's merging of [views, n*n, C], on a map C x H x W."""
    if merge.kind == "flat":
        return views.flatten(0, 1)
    if len(views) == 1:
        lone = views[0]
        return torch.cat([lone, newline[None]]) if "unpad" in merge.kind else lone
    base, tiles = views[0], views[1:]
    n = math.isqrt(base.shape[0])
    columns, rows = grid
    tiles = tiles.view(rows, columns, n, n, -1).permute(4, 0, 2, 1, 3)
    image = tiles.flatten(1, 2).flatten(2, 3)
    if "maxpool2x2" in merge.kind:
        image = torch.nn.functional.max_pool2d(image, 2)
    elif "unpad" in merge.kind:
        image = unpadded(image, size)
        if merge.most:
            image = shrunk(image, merge.most * n * n)
        image = torch.cat([image, newline[:, None, None].expand(-1, image.shape[1], 1)], 2)
    tokens = image.flatten(1).T
    return tokens if "nobase" in merge.kind else torch.cat([base, tokens])


def unpadded(image: torch.Tensor, size: Size) -> torch.Tensor:
    width, height = size
    _, rows, columns = image.shape
    if width / height > columns / rows:
        p = (rows - int(height * (columns / width))) // 2
        return image[:, p : rows - p]
    p = (columns - int(width * (rows / height))) // 2
    return image[:, :, p : columns - p]


def shrunk(image: torch.Tensor, most: int) -> torch.Tensor:
    _, rows, columns = image.shape
    times = math.sqrt(rows * columns / most)
    if times <= 1.1:
        return image
    size = [int(rows // times), int(columns // times)]
    assume(min(size) > 0)  # torch refuses an empty map
    return torch.nn.functional.interpolate(image[None], size, mode="bilinear")[0]


def features(views: int, n: int) -> torch.Tensor:
    return torch.randn(views, n * n, 5, generator=torch.Generator().manual_seed(views * n))


def arranged(
    order: TokenArrangement, views: torch.Tensor, newline: Any, grid: Any, size: Size
) -> Any:
    """Our index arithmetic, applied as the merger applies it."""
    found = arrange(order, len(views), grid, size)
    rows = views.flatten(0, 1).numpy()
    if order.newline:
        rows = np.concatenate([rows, newline.numpy()[None]])
    picked: Array = rows[found.rows]
    if order.pool:
        return picked.max(1)
    return (picked * found.weights[..., None]).sum(1)


@pytest.mark.parametrize("merge", MERGES, ids=lambda m: f"{m.kind} {m.most or ''}")
@settings(deadline=None, max_examples=40, derandomize=True)
@given(width=SIDE, height=SIDE, n=st.integers(2, 6), grid=st.sampled_from(MANY))
@example(width=2000, height=10, n=3, grid=(2, 2))
@example(width=10, height=2000, n=4, grid=(1, 3))
def test_tokens_follow_each_other_as_in_the_original(
    merge: Merge, width: int, height: int, n: int, grid: Size
) -> None:
    views = features(1 + grid[0] * grid[1], n)
    newline, size = torch.arange(5.0), (width, height)
    expected = merged(merge, views, newline, grid, size)
    found = arranged(merge.arrangement(n), views, newline, grid, size)
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("merge", MERGES, ids=lambda m: f"{m.kind} {m.most or ''}")
def test_a_single_view(merge: Merge) -> None:
    views, newline = features(1, 4), torch.arange(5.0)
    expected = merged(merge, views, newline, (1, 1), (30, 20))
    found = arranged(merge.arrangement(4), views, newline, None, (30, 20))
    np.testing.assert_array_equal(found, expected.numpy())


@modest
@given(SIDE, SIDE, st.integers(2, 5), st.sampled_from(MANY))
@example(700, 300, 3, (2, 1))
def test_rounded_lengths_are_those_of_transformers(
    width: int, height: int, n: int, grid: Size
) -> None:
    columns, rows = grid
    views = features(1 + columns * rows, n)
    image = views[1:].view(rows, columns, n, n, -1).permute(4, 0, 2, 1, 3)
    image = theirs_next.unpad_image(image.flatten(1, 2).flatten(2, 3), (height, width))
    newline = torch.arange(5.0)
    image = torch.cat([image, newline[:, None, None].expand(-1, image.shape[1], 1)], 2)
    expected = torch.cat([views[0], image.flatten(1).T])
    order = Merge("spatial_unpad").arrangement(n, rounded=True)
    found = arranged(order, views, newline, grid, (width, height))
    np.testing.assert_array_equal(found, expected.numpy())


@modest
@given(SIDE, SIDE, st.sampled_from([PUBLISHED, MANY]))
def test_the_grid_is_that_of_transformers(width: int, height: int, grids: tuple[Size, ...]) -> None:
    points = pinpoints(grids, 336)
    shape = theirs_next.get_anyres_image_grid_shape((height, width), flipped(points), 336)
    columns, rows = best_resolution((width, height), points)
    assert (rows // 336, columns // 336) == shape


def test_weights_of_a_token_add_up_to_one() -> None:
    found = arrange(Merge("spatial_unpad", 2).arrangement(6), 10, (3, 3), (640, 480))
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-6)
    assert found.rows.min() >= 0
    assert found.rows.max() == 10 * 36
    assert len(found.rows) < 2 * 36 + 36 + 12
