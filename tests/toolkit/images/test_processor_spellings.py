"""Every spelling of preprocessor_config.json that transformers' processors take, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.images.decode import load
from edgevlm.toolkit.images.preprocess import Preprocess, preprocess, read_preprocess
from edgevlm.toolkit.images.tiling import Tiling, cut
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader, from_plain, to_plain
from edgevlm.toolkit.systems import llava_next
from tests.toolkit.images.test_preprocess import CLIP_MEAN, CLIP_STD, SIZES, noise

CLASSES: dict[str, Any] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
}
TWO_EDGES = {"shortest_edge": 56, "longest_edge": 80}
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing stated": {},
    "switches of null": {"do_normalize": None, "do_rescale": None, "do_convert_rgb": None},
    "a resize of null": {"do_resize": None, "resample": None},
    "not normalised, and a crop of null": {"do_center_crop": None, "do_normalize": False},
    "not normalised": {"do_normalize": False},
    "not normalised, as Janus states it": {"do_normalize": False, "image_mean": [0.5] * 3,
                                           "image_std": [0.5] * 3},
    "not normalised, a deviation of 0": {"do_normalize": False, "image_std": 0},
    "not rescaled": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "not rescaled, a mean of bytes": {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5],
                                      "image_std": [58.4, 57.1, 57.4], "rescale_factor": 0.5},
    "box": {"resample": 4},
    "Hamming": {"resample": 5},
    "one number for all": {"image_mean": 0.5, "image_std": 0.25},
    "a whole number": {"image_mean": 0, "image_std": 1},
    "RGB is not asked for": {"do_convert_rgb": False},
    "two edges": {"size": TWO_EDGES},
    "two edges, the long one decides": {"size": {"shortest_edge": 56, "longest_edge": 57}},
    "two edges, the long one below": {"size": {"shortest_edge": 56, "longest_edge": 40}},
    "a long edge of null": {"size": {"shortest_edge": 56, "longest_edge": None}},
    "a list": {"size": [30, 50], "crop_size": [28, 44]},
    "not resized": {"do_resize": False},
    "not resized, another size": {"do_resize": False, "size": {"height": 9, "width": 8}},
}  # fmt: skip


def read(data: dict[str, Any]) -> Preprocess:
    reader = Reader(data, "preprocessor_config.json")
    rule = read_preprocess(reader)
    reader.done()
    return rule


def theirs(kind: Any, data: dict[str, Any], image: Image.Image) -> Array:
    """The pixels of transformers' class; bytes where nothing turned them into floats."""
    found: Array = kind.from_dict(dict(data))(image, return_tensors="np")["pixel_values"][0]
    return found


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_spelling_means_what_it_means_to_transformers(kind: str, name: str) -> None:
    data = {"image_processor_type": kind, **SPELLINGS[name]}
    rule = read(data)
    for size in SIZES:
        image = noise(*size)
        if rule.long_edge is not None and rule.long_edge * min(size) / max(size) < 0.5:
            continue  # transformers fails on these, see below
        found = preprocess(image, rule)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, theirs(CLASSES[kind], data, image))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_null_size_or_mean_is_the_default_of_the_class(kind: str) -> None:
    """As in transformers 4; release 5 fails on them."""
    stated = {"image_processor_type": kind}
    nulls = dict.fromkeys(("size", "crop_size", "image_mean", "image_std"))
    image = noise(61, 47)
    expected = theirs(CLASSES[kind], stated, image)
    np.testing.assert_array_equal(preprocess(image, read({**stated, **nulls})), expected)
    for key in ("rescale_factor", "resample"):
        with pytest.raises(ConfigError, match=f"{key} is null"):
            read({**stated, key: None})


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.integers(2, 200), st.integers(2, 200), st.integers(2, 90), st.integers(2, 90))
def test_two_edges_are_rounded_as_in_transformers(w: int, h: int, short: int, long: int) -> None:
    data = {"size": {"shortest_edge": short, "longest_edge": long}, "do_center_crop": False}
    image, rule = noise(w, h), read(data)
    try:
        expected = theirs(CLIPImageProcessorPil, data, image)
    except (ValueError, ZeroDivisionError):
        expected = np.zeros((3, 0, 0))
    if 0 in expected.shape:
        with pytest.raises(InputError, match="no pixel left"):
            preprocess(image, rule)
    else:
        np.testing.assert_array_equal(preprocess(image, rule), expected)


def test_an_image_that_would_vanish_is_refused() -> None:
    rule = read({"size": {"shortest_edge": 56, "longest_edge": 80}, "crop_size": 56})
    with pytest.raises(InputError, match="no pixel left in its short one"):
        preprocess(noise(400, 2), rule)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_that_are_not_rgb_where_none_is_converted(mode: str) -> None:
    """transformers' class has no answer for them; here they are read as everywhere else."""
    data = {"do_convert_rgb": False, "crop_size": 20, "size": 20}
    image = noise(31, 24).convert(mode)
    with pytest.raises(ValueError, match=r"mean must have \d elements"):
        theirs(CLIPImageProcessorPil, data, image)
    as_rgb = load(image).rgb
    expected = theirs(CLIPImageProcessorPil, data, as_rgb)
    np.testing.assert_array_equal(preprocess(as_rgb, read(data)), expected)


@pytest.mark.parametrize("normalises", [True, False])
def test_the_colour_of_padding_is_the_mean_all_the_same(normalises: bool) -> None:
    data = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "crop_size": 40,
            "size": 40, "do_normalize": normalises, "image_mean": [0.2, 0.4, 0.8]}  # fmt: skip
    image = noise(61, 30)
    found = preprocess(image, read(data))
    np.testing.assert_array_equal(found, theirs(LlavaImageProcessorPil, data, image))


@pytest.mark.parametrize("size", [{"shortest_edge": 56}, TWO_EDGES, {"shortest_edge": 9}])
@pytest.mark.parametrize("change", [{"do_center_crop": False}, {"do_resize": False}])
def test_a_size_that_depends_on_the_image_is_refused(size: Any, change: dict[str, Any]) -> None:
    rule = read({"size": size, "do_center_crop": False, **change})
    with pytest.raises(ConfigError, match="depends on the image"):
        _ = rule.size


def test_a_manifest_of_an_earlier_export_is_read() -> None:
    rule = Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, short_edge=56, crop=(56, 56))
    written = to_plain(rule)
    earlier = {k: v for k, v in written.items() if k not in ("long_edge", "normalise")}
    assert from_plain(Preprocess, earlier, "manifest") == rule
    assert from_plain(Preprocess, written, "manifest") == rule
    assert from_plain(Tiling, {"pinpoints": [[56, 28]], "tile": 28}, "").resample == "bicubic"


# -- tiles -------------------------------------------------------------------------------------

POINTS = [[28, 56], [56, 28], [56, 56]]


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("change", [{}, {"do_normalize": False}, {"image_mean": 0.5}])
def test_views_are_made_with_the_filter_of_the_processor(
    resample: int, change: dict[str, Any]
) -> None:
    side = {"height": 28, "width": 28}
    next_ = {"size": {"shortest_edge": 28}, "crop_size": side}
    for kind, sizes in ((LlavaNextImageProcessorPil, next_),
                        (LlavaOnevisionImageProcessorPil, {"size": side})):  # fmt: skip
        data = {"resample": resample, "image_grid_pinpoints": POINTS, **sizes, **change}
        data["image_processor_type"] = kind.__name__.removesuffix("Pil")
        rule, image = read(data), noise(75, 41)
        points = tuple((w, h) for h, w in POINTS)
        tiling = Tiling(points, 28, base=rule.short_edge, resample=rule.resample)
        found = np.stack([preprocess(view, rule) for view in cut(image, tiling).images])
        np.testing.assert_array_equal(found, theirs(kind, data, image))


def test_the_systems_with_tiles_take_the_filter_of_the_processor() -> None:
    rule = read({"size": 28, "crop_size": 28, "resample": 2})
    pinned = {"image_grid_pinpoints": POINTS}
    encoder: Any = type("Encoder", (), {"name": "clip", "config": type("C", (), {"tokens": 4})})
    for images in (llava_next._next_images, llava_next._onevision_images):
        tiling = images(Reader(pinned, "config.json"), encoder, rule).tiling
        assert tiling is not None
        assert tiling.resample == "bilinear"
        with pytest.raises(ConfigError, match="do_resize = False is not implemented for"):
            images(Reader(pinned, "config.json"), encoder, read({"do_resize": False}))


def test_what_processors_write_is_read() -> None:
    for kind in CLASSES.values():
        data = json.loads(kind(do_normalize=False, do_rescale=False, resample=4).to_json_string())
        data["image_processor_type"] = data["image_processor_type"].removesuffix("Pil")
        image = noise(40, 30)
        np.testing.assert_array_equal(preprocess(image, read(data)), theirs(kind, data, image))
