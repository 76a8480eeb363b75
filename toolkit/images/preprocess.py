"""From RGB images to pixel tensors: preprocessing as data, executed by Pillow and NumPy.

The result is bit-equal to what the originals feed their towers (Hugging Face's PIL processors
after LLaVA's own aspect handling).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgevlm.toolkit.errors import ConfigError
from edgevlm.toolkit.images.decode import MAX_SIDE
from edgevlm.toolkit.images.tiling import Tiling, TokenArrangement
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader

if TYPE_CHECKING:
    from PIL.Image import Image

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_CROPPING = ("CLIP", "LlavaNext", "LlavaImage", "Bit")
_PROCESSORS = (
    "CLIPImageProcessor", "CLIPFeatureExtractor", "SiglipImageProcessor", "LlavaImageProcessor",
    "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor", "BitImageProcessor",
)  # fmt: skip
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocess:
    """How one encoder's pixels are made: pad, resize, crop, rescale, normalise, in that order.

    pad: colour of the square in whose centre the image is put first; None for no padding.
    short_edge: resize so that the short edge has this length (long edge rounded down), or
    exact: resize to (height, width) regardless of aspect; crop: centred (height, width).
    """

    resample: Resample
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: tuple[int, int, int] | None = None
    short_edge: int | None = None
    exact: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result. Raises ConfigError if they depend on the image."""
        size = self.crop or self.exact
        if size is None:
            raise ConfigError("the preprocessing has neither a crop nor an exact size")
        return size

    def padded(self) -> Preprocess:
        """The same with padding to a square of the mean colour: image_aspect_ratio = pad."""
        r, g, b = (int(m * 255) for m in self.mean)
        return Preprocess(**{**vars(self), "pad": (r, g, b)})


@dataclass(frozen=True)
class ImageRules:
    """How an image becomes pixels for every encoder, and how its features become tokens.

    encoders: preprocessing by encoder name. tiling: AnyRes, None for a single view. arrangement:
    the order of the views' tokens, None for view after view. upright: whether EXIF orientation is
    applied.
    """

    encoders: Mapping[str, Preprocess] = field(default_factory=dict)
    tiling: Tiling | None = None
    arrangement: TokenArrangement | None = None
    upright: bool = True


def read_preprocess(r: Reader) -> Preprocess:
    """From a preprocessor_config.json of CLIPImageProcessor or SiglipImageProcessor."""
    r.ignore("preprocessing")
    kind = r.take("image_processor_type", str, "CLIPImageProcessor")
    if not kind.startswith(_PROCESSORS):
        raise ConfigError(
            f"{r.where}: image_processor_type {kind!r} is not implemented",
            hint=f"implemented: {', '.join(_PROCESSORS)}",
        )
    pads = r.take("do_pad", bool, False) and kind.startswith("LlavaImage")
    for switch in ("do_rescale", "do_normalize", "do_resize"):
        r.choice(switch, [True], True)
    r.choice("do_convert_rgb", [True], True)
    r.choice("aspect_ratio_setting", ["anyres"], "anyres")
    short, exact = _read_size(r.raw("size"), r.where)
    crops = r.take("do_center_crop", bool, kind.startswith(_CROPPING))
    crop_size = r.raw("crop_size")
    crop = _read_crop(crop_size, r.where) if crops else None
    std = _three(r.raw("image_std"), f"{r.where}: image_std")
    if min(std) <= 0:
        raise ConfigError(f"{r.where}: image_std = {list(std)}, expected numbers above 0")
    rule = Preprocess(
        resample=_resample(r.choice("resample", list(_RESAMPLE), 3)),
        scale=r.take("rescale_factor", float, 1 / 255),
        mean=_three(r.raw("image_mean"), f"{r.where}: image_mean"),
        std=std,
        short_edge=short,
        exact=exact,
        crop=crop,
    )
    return rule.padded() if pads else rule


def _resample(code: int) -> Resample:
    names: dict[int, Resample] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    return names[code]


def _read_size(size: Any, where: str) -> tuple[int | None, tuple[int, int] | None]:
    if type(size) is int:
        return _side(size, f"{where}: size"), None
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return _side(size["shortest_edge"], f"{where}: size"), None
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return None, _height_width(size, f"{where}: size")
    raise ConfigError(f"{where}: size = {size!r} is not implemented")


def _read_crop(size: Any, where: str) -> tuple[int, int]:
    if type(size) is int:
        size = {"height": size, "width": size}
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return _height_width(size, f"{where}: crop_size")
    raise ConfigError(f"{where}: crop_size = {size!r} is not implemented")


def _height_width(size: Mapping[str, Any], where: str) -> tuple[int, int]:
    return _side(size["height"], where), _side(size["width"], where)


def _side(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise ConfigError(f"{where} has a side of {value!r}, expected 1 to {MAX_SIDE} pixels")
    return value


def _three(value: Any, where: str) -> tuple[float, float, float]:
    numbers = value if isinstance(value, list) else []
    valid = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    if len(numbers) != 3 or not valid:
        raise ConfigError(f"{where} = {value!r}, expected three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


# -- preprocessing -------------------------------------------------------------------------


def preprocess(image: Image, rule: Preprocess) -> Array:
    """The encoder's input for one RGB image: float32 [3, height, width]."""
    if rule.pad is not None:
        image = _pad_square(image, rule.pad)
    image = image.resize(_target_size(image.size, rule), _filter(rule.resample))
    pixels = np.asarray(image)
    if rule.crop is not None:
        pixels = _centre_crop(pixels, rule.crop)
    # A byte has 256 values, so the float arithmetic runs once per value and channel, not per pixel.
    table = _normalised_bytes(rule)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def _pad_square(image: Image, colour: tuple[int, int, int]) -> Image:
    from PIL import Image

    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _target_size(size: tuple[int, int], rule: Preprocess) -> tuple[int, int]:
    """(width, height) for Pillow."""
    if rule.exact is not None:
        return rule.exact[1], rule.exact[0]
    if rule.short_edge is None:
        return size
    width, height = size
    short, long = min(size), max(size)
    stretched = int(rule.short_edge * long / short)
    return (rule.short_edge, stretched) if width <= height else (stretched, rule.short_edge)


def _filter(name: Resample) -> Any:
    from PIL import Image

    return Image.Resampling[name.upper()]


def _centre_crop(pixels: Array, size: tuple[int, int]) -> Array:
    """The centre of size (height, width); zeros pad smaller images, as in the originals."""
    for axis, length in enumerate(size):
        available = pixels.shape[axis]
        if available < length:
            before = -(-(length - available) // 2)
            pad = [(0, 0)] * pixels.ndim
            pad[axis] = (before, length - available - before)
            pixels = np.pad(pixels, pad)
        elif available > length:
            first = (available - length) // 2
            pixels = pixels.take(range(first, first + length), axis)
    return pixels


def _normalised_bytes(rule: Preprocess) -> Array:
    """[3, 256] float32: every byte scaled in float64, cast, then normalised in float32."""
    scaled = (np.arange(256, dtype=np.uint8) * rule.scale).astype(np.float32)
    mean, std = np.asarray(rule.mean, np.float32), np.asarray(rule.std, np.float32)
    return np.asarray((scaled[None] - mean[:, None]) / std[:, None], np.float32)
