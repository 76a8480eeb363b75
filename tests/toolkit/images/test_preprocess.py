"""Preprocessing is bit-equal to transformers' PIL processors, for sizes of every kind."""

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
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.images.preprocess import Preprocess, preprocess, read_preprocess
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = st.integers(2, 150)
# (width, height): even, odd, smaller than the crop, strips, one side exactly right
SIZES = [
    (56, 56), (57, 55), (100, 56), (56, 101), (20, 17), (3, 90), (301, 4), (2, 2), (2, 400),
    (111, 222), (640, 481), (55, 56), (1, 1), (1, 7),
]  # fmt: skip


def cropped(kind: Any, short: int, crop: tuple[int, int], **more: Any) -> Any:
    size = {"height": crop[0], "width": crop[1]}
    return kind(size={"shortest_edge": short}, crop_size=size, **more)


PROCESSORS: dict[str, Any] = {
    "clip": cropped(CLIPImageProcessorPil, 56, (56, 56)),
    "clip, odd": cropped(CLIPImageProcessorPil, 45, (45, 45)),
    "crop larger than the image": cropped(CLIPImageProcessorPil, 32, (57, 44)),
    "crop smaller than the short edge": cropped(CLIPImageProcessorPil, 64, (41, 56)),
    "bit, as in ConvLLaVA's towers": cropped(BitImageProcessorPil, 64, (64, 64)),
    "bilinear": cropped(CLIPImageProcessorPil, 40, (40, 40), resample=2),
    "nearest": cropped(CLIPImageProcessorPil, 40, (40, 40), resample=0),
    "lanczos": cropped(CLIPImageProcessorPil, 40, (40, 40), resample=1),
    "other figures": cropped(
        CLIPImageProcessorPil,
        40,
        (40, 40),
        rescale_factor=1 / 127.5,
        image_mean=[1.0, 0.9, 1.1],
        image_std=[0.5, 1.5, 1.0],
    ),
    "without a crop": CLIPImageProcessorPil(size={"height": 30, "width": 50}, do_center_crop=False),
    "siglip": SiglipImageProcessorPil(size={"height": 48, "width": 48}),
    "siglip, oblong": SiglipImageProcessorPil(size={"height": 37, "width": 62}),
}


def rule_of(processor: Any) -> Preprocess:
    """Our rule, read from what the processor itself writes as preprocessor_config.json."""
    data = json.loads(processor.to_json_string())
    data["image_processor_type"] = data["image_processor_type"].removesuffix("Pil")
    reader = Reader(data, "preprocessor_config.json")
    rule = read_preprocess(reader)
    reader.done()
    return rule


def noise(width: int, height: int) -> Image.Image:
    """An image of random pixels: every value that resizing gets wrong shows."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def theirs(processor: Any, image: Image.Image) -> Array:
    found: Array = processor(image, return_tensors="np")["pixel_values"][0]
    return found


def same(found: Array, expected: Array) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert found.tobytes() == expected.astype(np.float32).tobytes()


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name: str) -> None:
    processor = PROCESSORS[name]
    rule = rule_of(processor)
    for size in SIZES:
        image = noise(*size)
        same(preprocess(image, rule), theirs(processor, image))


STRAY = {"pad": True, "tokenizer_class": "LlamaTokenizer", "image_token": "<image>",
         "patch_size": 7, "crop_pct": 0.5, "num_additional_image_tokens": 1}  # fmt: skip


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_keys_that_a_processor_does_not_know_change_nothing(kind: Any) -> None:
    """Published files carry `pad: true` and keys of other classes."""
    plain = cropped(kind, 40, (40, 40)) if kind is CLIPImageProcessorPil else kind(size=40)
    data = {**json.loads(plain.to_json_string()), **STRAY}
    data["image_processor_type"] = data["image_processor_type"].removesuffix("Pil")
    reader = Reader(data, "preprocessor_config.json")
    rule = read_preprocess(reader)
    reader.done()
    image = noise(61, 45)
    same(preprocess(image, rule), theirs(kind.from_dict(data), image))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(SIDE, SIDE, st.integers(8, 60), st.integers(8, 60), st.integers(8, 60))
def test_any_size_any_crop(width: int, height: int, short: int, high: int, across: int) -> None:
    processor = cropped(CLIPImageProcessorPil, short, (high, across))
    image = noise(width, height)
    same(preprocess(image, rule_of(processor)), theirs(processor, image))


def expand2square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """LLaVA's padding, pixel by pixel: centred, an odd pixel below or to the right."""
    width, height = image.size
    side = max(width, height)
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = colour
    top = (width - height) // 2 if width > height else 0
    left = (height - width) // 2 if height > width else 0
    pixels[top : top + height, left : left + width] = np.asarray(image)
    return Image.fromarray(pixels)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(SIDE, SIDE)
def test_padding_is_that_of_llava(width: int, height: int) -> None:
    processor = PROCESSORS["clip"]
    image, rule = noise(width, height), rule_of(processor).padded()
    assert rule.pad == (122, 116, 104)
    same(preprocess(image, rule), theirs(processor, expand2square(image, (122, 116, 104))))


def test_the_square_of_padding_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled band by band, to the same bits, by every filter."""
    monkeypatch.setattr("edgevlm.toolkit.images.preprocess._BAND", 1000)
    for width, height in ((301, 4), (4, 301), (90, 61), (61, 90), (56, 7), (700, 350), (350, 700)):
        image, side = noise(width, height), max(width, height)
        square = Image.new("RGB", (side, side), (122, 116, 104))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        for resample in ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"):
            for size in ({"exact": (56, 48)}, {"short_edge": 56}):
                plain = Preprocess(resample, 1 / 255, CLIP_MEAN, CLIP_STD, None, **size)
                padded = preprocess(image, plain.padded())
                np.testing.assert_array_equal(padded, preprocess(square, plain))


def test_padding_that_is_not_scaled_down_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, (9, 9, 9), crop=(5, 5))
    assert preprocess(noise(20, 30), rule).shape == (3, 5, 5)
    monkeypatch.setattr("edgevlm.toolkit.images.preprocess.MAX_PIXELS", 899)
    with pytest.raises(InputError, match="20 x 30 pixels, padded to a square"):
        preprocess(noise(20, 30), rule)


def test_padding_of_siglip_is_grey() -> None:
    processor = PROCESSORS["siglip"]
    rule, image = rule_of(processor).padded(), noise(31, 90)
    assert rule.pad == (127, 127, 127)
    same(preprocess(image, rule), theirs(processor, expand2square(image, (127, 127, 127))))


@pytest.mark.parametrize("pads", [True, False])
def test_the_padding_of_a_llava_processor(pads: bool) -> None:
    processor = cropped(LlavaImageProcessorPil, 56, (56, 56), do_pad=pads)
    rule = rule_of(processor)
    assert (rule.pad is not None) == pads
    for size in ((57, 90), (90, 57), (30, 30), (7, 200)):
        image = noise(*size)
        same(preprocess(image, rule), theirs(processor, image))


def test_the_size_is_known_beforehand() -> None:
    assert rule_of(PROCESSORS["crop larger than the image"]).size == (57, 44)
    assert rule_of(PROCESSORS["siglip, oblong"]).size == (37, 62)
    loose = Preprocess("bicubic", 1 / 255, CLIP_MEAN, CLIP_STD, short_edge=40)
    with pytest.raises(ConfigError, match="neither"):
        _ = loose.size


GOOD = {
    "size": {"shortest_edge": 56},
    "crop_size": 56,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_processor_type": "Unknown"}, "Unknown"),
        ({"do_normalize": "no"}, "do_normalize"),
        ({"do_resize": 1}, "do_resize"),
        ({"do_convert_rgb": 0}, "do_convert_rgb"),
        ({"resample": 6}, "resample"),
        ({"resample": True}, "resample"),
        ({"size": {"longest_edge": 56}}, "size"),
        ({"size": {"shortest_edge": "56"}}, "size"),
        ({"size": {"shortest_edge": 56.5}}, "size"),
        ({"size": True}, "size"),
        ({"size": {"max_height": 56, "max_width": 56}}, "size"),
        ({"size": {"shortest_edge": 56, "longest_edge": -1}}, "size"),
        ({"size": {"shortest_edge": None, "longest_edge": 80}}, "size"),
        ({"size": [56]}, "size"),
        ({"size": 0}, "size"),
        ({"size": {"height": None, "width": 4}}, "size"),
        ({"crop_size": {"height": 56}}, "crop_size"),
        ({"crop_size": -1}, "crop_size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": True}, "image_mean"),
        ({"image_mean": [0.5, 0.5, "x"]}, "image_mean"),
        ({"image_std": [0.5, None, 0.5]}, "image_std"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": 0}, "image_std"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], named: str) -> None:
    reader = Reader(GOOD | change, "preprocessor_config.json")
    with pytest.raises(ConfigError, match=named):
        read_preprocess(reader)
        reader.done()


def test_what_is_implemented_is_read() -> None:
    reader = Reader(GOOD, "preprocessor_config.json")
    rule = read_preprocess(reader)
    reader.done()
    assert (rule.short_edge, rule.crop, rule.resample) == (56, (56, 56), "bicubic")


@pytest.mark.parametrize("odd", [10**400, -(10**31), float("nan"), float("inf"), True, "0.5"])
def test_a_mean_that_is_no_number_of_a_colour_is_refused(odd: Any) -> None:
    data = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5, odd, 0.5]}
    with pytest.raises(ConfigError, match="expected three numbers"):
        read_preprocess(Reader(data, "preprocessor_config.json"))
