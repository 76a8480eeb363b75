"""From RGB images to pixel tensors: preprocessing as data, executed by Pillow and NumPy.

The result is bit-equal to what the originals feed their towers (Hugging Face's PIL processors
after LLaVA's own aspect handling).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.toolkit.errors import ConfigError, InputError
from edgevlm.toolkit.images.decode import MAX_PIXELS, MAX_SIDE
from edgevlm.toolkit.images.tiling import Resample, Tiling, TokenArrangement, pillow_filter
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.strict import Reader

if TYPE_CHECKING:
    from PIL.Image import Image

_BAND = 1 << 20  # pixels of a padded band
_BEYOND = 1e30  # no colour's mean or spread; an integer may be too large for a float
Colour = tuple[float, float, float]  # one number per channel

_RESAMPLE: dict[int, Resample] = {
    0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming",
}  # fmt: skip
# What the classes take for keys that the file lacks or states as null.
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_SIZES = {"Siglip": {"height": 224, "width": 224}, "LlavaOnevision": {"height": 384, "width": 384}}
_CROPPING = ("CLIP", "LlavaNext", "LlavaImage", "Bit")
_PROCESSORS = (
    "CLIPImageProcessor", "CLIPFeatureExtractor", "SiglipImageProcessor", "LlavaImageProcessor",
    "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor", "BitImageProcessor",
    "ConvNextImageProcessor", "ConvNextFeatureExtractor",
)  # fmt: skip


@dataclass(frozen=True)
class Preprocess:
    """How one encoder's pixels are made: pad, resize, crop, rescale, normalise, in that order.

    pad: colour of the square in whose centre the image is put first; None for no padding.
    short_edge: resize so that the short edge has this length (long edge rounded down), but
    long_edge: to a shorter one where the long edge would exceed this; or
    exact: resize to (height, width) regardless of aspect; crop: centred (height, width).
    normalise: whether mean and std are applied; the mean is the colour of padding all the same.
    rgb_last: the image is resized and cropped in its own mode, and made RGB then: transparent
    colours weigh less, and palettes are not blended. half_even: half a spare pixel rounds the
    crop's offset to the even one, as torchvision does; else down.
    """

    resample: Resample
    scale: float
    mean: Colour
    std: Colour
    pad: tuple[int, int, int] | None = None
    short_edge: int | None = None
    exact: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    long_edge: int | None = None
    normalise: bool = True
    rgb_last: bool = False
    half_even: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result. Raises ConfigError if they depend on the image."""
        size = self.crop or self.exact
        if size is None:
            raise ConfigError(
                "the preprocessing has neither a crop nor an exact size: the size of its result "
                "depends on the image, and the tower takes one size"
            )
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
    """From a preprocessor_config.json of one of the processors above, as its class reads it.

    A missing key means the default of the class; a switch that is null is off. `do_convert_rgb` is
    true for every image: without it the classes fail on images that are not RGB already. Raises
    ConfigError for another processor, or what it is not implemented for.
    """
    r.ignore("preprocessing")
    kind = r.take("image_processor_type", str, "CLIPImageProcessor")
    if not kind.startswith(_PROCESSORS):
        raise ConfigError(
            f"{r.where}: image_processor_type {kind!r} is not implemented",
            hint=f"implemented: {', '.join(_PROCESSORS)}",
        )
    pads = _switch(r, "do_pad", False) and kind.startswith("LlavaImage")
    r.choice("aspect_ratio_setting", ["anyres"], "anyres")
    r.take("do_convert_rgb", bool, True)
    rescales, normalises = _switch(r, "do_rescale", True), _switch(r, "do_normalize", True)
    factor = r.positive("rescale_factor", 1 / 255) if rescales else r.raw("rescale_factor")
    mean, std = _read_moments(r, kind, normalises)
    size = _or_default(r.raw("size"), kind, _SIZES, {"shortest_edge": 224})
    resizes = _switch(r, "do_resize", True)
    short, long, exact = _read_size(size, r.where) if resizes else (None, None, None)
    crops = _switch(r, "do_center_crop", kind.startswith(_CROPPING))
    smooth = 2 if kind.startswith("ConvNext") else 3
    code = r.choice("resample", list(_RESAMPLE), smooth, nullable=not resizes)
    crop_size = _or_default(
        r.raw("crop_size"), kind, {}, 224 if kind.startswith(_CROPPING) else None
    )
    rule = Preprocess(
        resample=_RESAMPLE[code],
        scale=factor if rescales else 1.0,
        mean=mean,
        std=std,
        short_edge=short,
        exact=exact,
        crop=_read_crop(crop_size, r.where) if crops else None,
        long_edge=long,
        normalise=normalises,
    )
    if kind.startswith("ConvNext") and short is not None:
        rule = _convnext(rule, r.positive("crop_pct", 224 / 256))
    return rule.padded() if pads else rule


def _convnext(rule: Preprocess, share: float) -> Preprocess:
    """Below 384 pixels a crop that keeps `share` of the short edge, above the whole image squashed
    to a square: ConvNextImageProcessor.
    """
    side = rule.short_edge
    assert side is not None
    if side >= 384:
        return replace(rule, short_edge=None, exact=(side, side))
    return replace(rule, short_edge=int(side / share), crop=(side, side))


def check_tiles(rule: Preprocess, where: str) -> None:
    """Raise ConfigError if tiles cannot be made: nothing says how large the first view is."""
    if rule.short_edge is None and rule.exact is None:
        raise ConfigError(
            f"{where}: do_resize = False is not implemented for images in tiles",
            hint="take preprocessor_config.json from the place where the weights come from",
        )


def _switch(r: Reader, key: str, default: bool) -> bool:
    """A switch; null is off, and a missing one is the default of the class."""
    on = r.take(key, bool, default)
    return on and (r.has(key) or not r.given(key))


def _or_default(value: Any, kind: str, by_kind: Mapping[str, Any], default: Any) -> Any:
    """The value, or what the class called `kind...` takes instead of null."""
    if value is not None:
        return value
    return next((own for name, own in by_kind.items() if kind.startswith(name)), default)


def _read_moments(r: Reader, kind: str, normalises: bool) -> tuple[Colour, Colour]:
    """image_mean and image_std: three numbers, or one for all channels."""
    half = {"Siglip": [0.5] * 3, "ConvNext": [0.5] * 3}
    mean = _or_default(r.raw("image_mean"), kind, half, _CLIP_MEAN)
    std = _or_default(r.raw("image_std"), kind, half, _CLIP_STD)
    means, stds = _three(mean, f"{r.where}: image_mean"), _three(std, f"{r.where}: image_std")
    if normalises and min(stds) <= 0:
        raise ConfigError(f"{r.where}: image_std = {std}, expected numbers above 0")
    return means, stds


def _read_size(size: Any, where: str) -> tuple[int | None, int | None, tuple[int, int] | None]:
    """short_edge, long_edge and exact."""
    stated = f"{where}: size"
    if type(size) is int:
        return _side(size, stated), None, None
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, dict) and set(size) in (
        {"shortest_edge"},
        {"shortest_edge", "longest_edge"},
    ):
        long = size.get("longest_edge")
        return _side(size["shortest_edge"], stated), _side(long, stated) if long else None, None
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return None, None, _height_width(size, stated)
    raise ConfigError(
        f"{stated} = {size!r} is not implemented",
        hint="implemented: shortest_edge, with longest_edge or without; height and width",
    )


def _read_crop(size: Any, where: str) -> tuple[int, int]:
    if type(size) is int:
        size = [size, size]
    if isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return _height_width(size, f"{where}: crop_size")
    raise ConfigError(f"{where}: crop_size = {size!r} is not implemented")


def _height_width(size: Mapping[str, Any], where: str) -> tuple[int, int]:
    return _side(size["height"], where), _side(size["width"], where)


def _side(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise ConfigError(f"{where} has a side of {value!r}, expected 1 to {MAX_SIDE} pixels")
    return value


def _three(value: Any, where: str) -> Colour:
    numbers = value if isinstance(value, list) else [value] * 3
    valid = all(type(n) in (int, float) and abs(n) < _BEYOND for n in numbers)  # NaN is not
    if len(numbers) != 3 or not valid:
        raise ConfigError(f"{where} = {value!r:.200}, expected three numbers, or one for all")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


# -- preprocessing -------------------------------------------------------------------------


def preprocess(image: Image, rule: Preprocess) -> Array:
    """The encoder's input for one RGB image: float32 [3, height, width].

    With `rgb_last` the image may have another mode.
    """
    if rule.pad is not None and image.width != image.height:
        image = _pad_square(image, rule)
    else:
        image = _resized(image, rule)
    if image.mode != "RGB":
        return preprocess_rgb(_own_mode_cropped(image, rule).convert("RGB"), rule)
    return preprocess_rgb(image, rule)


def preprocess_rgb(image: Image, rule: Preprocess) -> Array:
    """The last steps of `preprocess`, for an image that has its size but for the crop."""
    pixels = np.asarray(image)
    if rule.crop is not None:
        pixels = _centre_crop(pixels, rule.crop, half_even=rule.half_even)
    # A byte has 256 values, so the float arithmetic runs once per value and channel, not per pixel.
    table = _normalised_bytes(rule)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])


def _resized(image: Image, rule: Preprocess) -> Image:
    target = _target_size(image.size, rule)
    return image if target is None else image.resize(target, pillow_filter(rule.resample))


def _pad_square(image: Image, rule: Preprocess) -> Image:
    """The image in the centre of a square, resized.

    The square of a long image takes more memory than all else, so it is never made: Pillow scales
    columns first and rows then, and only what the first step leaves is needed at once.
    """
    from PIL import Image

    colour, (width, height) = rule.pad, image.size
    assert colour is not None
    side = max(width, height)
    target = _target_size((side, side), rule)
    resample, columns = pillow_filter(rule.resample), target[0] if target else side
    if columns * side > MAX_PIXELS:
        raise InputError(
            f"an image of {width} x {height} pixels, padded to a square and not scaled down, would "
            f"have {columns * side / 1e6:.0f} megapixels; the limit is {MAX_PIXELS // 10**6}",
            hint="scale it down first",
        )
    square = Image.new("RGB", (columns, side), colour)
    if height < side:
        square.paste(image.resize((columns, height), resample), (0, (side - height) // 2))
    else:
        rows = max(1, _BAND // side)
        for top in range(0, side, rows):
            part = image.crop((0, top, width, min(top + rows, side)))
            band = Image.new("RGB", (side, part.height), colour)
            band.paste(part, ((side - width) // 2, 0))
            square.paste(band.resize((columns, part.height), resample), (0, top))
    return square if target is None else square.resize(target, resample)


def _target_size(size: tuple[int, int], rule: Preprocess) -> tuple[int, int] | None:
    """(width, height) for Pillow; None if the image is not resized."""
    if rule.exact is not None:
        return rule.exact[1], rule.exact[0]
    if rule.short_edge is None:
        return None
    width, height = size
    short, long = min(size), max(size)
    edges = rule.short_edge, int(rule.short_edge * long / short)
    if rule.long_edge is not None:
        edges = _within(short, long, rule.short_edge, rule.long_edge)
    return edges if width <= height else (edges[1], edges[0])


def _within(short: int, long: int, short_edge: int, long_edge: int) -> tuple[int, int]:
    """Short and long edge with the long one within its limit, in the arithmetic of transformers'
    `get_size_with_aspect_ratio`. Raises InputError for an image that would vanish."""
    edge: float = short_edge
    if long / short * short_edge > long_edge:
        edge = long_edge * short / long
    if short == round(edge):
        return short, long
    if round(edge) < 1:
        raise InputError(
            f"an image of {short} x {long} pixels, whose long edge may have {long_edge} here, "
            "would have no pixel left in its short one",
            hint="cut it into pieces and give them as several images",
        )
    return round(edge), int(edge * long / short)


def _own_mode_cropped(image: Image, rule: Preprocess) -> Image:
    """The centre as an image of the same mode; one that is smaller than the crop as it is."""
    if rule.crop is None or image.height < rule.crop[0] or image.width < rule.crop[1]:
        return image
    top, left = (
        _offset(available - length, half_even=rule.half_even)
        for available, length in zip((image.height, image.width), rule.crop, strict=True)
    )
    return image.crop((left, top, left + rule.crop[1], top + rule.crop[0]))


def _offset(spare: int, *, half_even: bool) -> int:
    return round(spare / 2) if half_even else spare // 2


def _centre_crop(pixels: Array, size: tuple[int, int], *, half_even: bool = False) -> Array:
    """The centre of size (height, width); zeros pad smaller images, as in the originals."""
    for axis, length in enumerate(size):
        available = pixels.shape[axis]
        if available < length:
            before = -(-(length - available) // 2)
            pad = [(0, 0)] * pixels.ndim
            pad[axis] = (before, length - available - before)
            pixels = np.pad(pixels, pad)
        elif available > length:
            first = _offset(available - length, half_even=half_even)
            pixels = pixels.take(range(first, first + length), axis)
    return pixels


def _normalised_bytes(rule: Preprocess) -> Array:
    """[3, 256] float32: every byte scaled in float64, cast, then normalised in float32."""
    scaled = (np.arange(256, dtype=np.uint8) * rule.scale).astype(np.float32)
    if not rule.normalise:
        return np.repeat(scaled[None], 3, 0)
    mean, std = np.asarray(rule.mean, np.float32), np.asarray(rule.std, np.float32)
    return np.asarray((scaled[None] - mean[:, None]) / std[:, None], np.float32)
