"""Questions from Python: what is taken for one image or text, and what is refused before work."""

from __future__ import annotations

from collections import deque
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm.engines.runtime.question import Question
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Session
from edgevlm.toolkit.errors import InputError, ToolkitError
from edgevlm.toolkit.images.decode import load
from tests.conftest import HERE
from tests.pipeline import engine_of

GOLDEN = HERE / "goldens/e2e_llava15"
IMAGE = GOLDEN / "image.png"
PIXELS = np.asarray(Image.open(IMAGE).convert("RGB"))


def checked(**fields: Any) -> Any:
    return Question(**{"prompt": "What?", **fields}).checked()


@pytest.mark.parametrize(
    "one", [str(IMAGE), IMAGE, IMAGE.read_bytes(), PIXELS, Image.new("L", (4, 4))]
)
def test_a_lone_image_is_one_image(one: Any) -> None:
    assert len(checked(images=one).images) == 1
    assert len(checked(images=[one, one]).images) == 2
    assert checked(images=deque([one])).images[0] is one


def test_none_is_no_image_and_no_text() -> None:
    found = checked(images=None, stop=None, history=None)
    assert (found.images, found.stop, found.history) == ((), (), ())


def test_a_lone_stop_is_one_text() -> None:
    assert checked(stop="xyz X").stop == ("xyz X",)
    assert checked(stop=["x", ""]).stop == ("x", "")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt = None, expected a text"),
    ({"prompt": b"bytes"}, "prompt = b'bytes'"),
    ({"prompt": "a\ud800b"}, "U+D800"),
    ({"prompt": "caf\udce9"}, "at index 3"),
    ({"history": "Hi"}, "history is one text"),
    ({"history": [1, 2]}, "history[0] = 1"),
    ({"history": ["x", "y\udfff"]}, "history[1] has half a character"),
    ({"history": 7}, "history = 7"),
    ({"stop": ["\ud83d"]}, "stop[0] has half a character"),
    ({"stop": [None]}, "stop[0] = None"),
    ({"stop": b"x"}, "stop = b'x'"),
    ({"stop": 3}, "stop = 3"),
    ({"images": 3}, "images is 3"),
    ({"images": [None]}, "image 1 is None"),
    ({"images": [IMAGE, 3.5]}, "image 2 is 3.5"),
    ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "an array [2, 8, 8, 3] of uint8"),
    ({"images": [np.zeros(5, np.uint8)]}, "image 1 is an array [5] of uint8"),
    ({"images": {"a": 1}}, "images is {'a': 1}"),
    ({"max_tokens": 0}, "--max-tokens 0 is less than 1"),
    ({"max_tokens": 2.5}, "--max-tokens 2.5 is not a whole number"),
    ({"max_tokens": True}, "--max-tokens True"),
    ({"max_tokens": "5"}, "--max-tokens '5'"),
    ({"max_tokens": None}, "--max-tokens None"),
    ({"template": None}, "template = None"),
    ({"sampling": 0.7}, "sampling = 0.7"),
    ({"sampling": Sampling(-1.0)}, "--temperature -1.0"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c[1])
def test_what_has_no_meaning_is_refused(case: tuple[dict[str, Any], str]) -> None:
    fields, reason = case
    with pytest.raises(ToolkitError) as refused:
        checked(**fields)
    assert reason in refused.value.message
    assert "\n" not in refused.value.message


def test_whole_numbers_of_any_kind_count_tokens() -> None:
    assert checked(max_tokens=np.int64(5)).max_tokens == 5
    assert checked(max_tokens=10**30).max_tokens == 10**30


# -- images in memory ---------------------------------------------------------------------------


def rgb(source: Any, *, upright: bool = True) -> Any:
    return np.asarray(load(source, upright=upright).rgb)


def test_every_way_to_give_an_image_gives_the_same_pixels() -> None:
    for source in (
        str(IMAGE),
        IMAGE,
        IMAGE.read_bytes(),
        bytearray(IMAGE.read_bytes()),
        Image.open(IMAGE),
        PIXELS,
        PIXELS[::-1][::-1],
    ):
        np.testing.assert_array_equal(rgb(source), PIXELS)


def test_arrays_are_rgb_grey_or_with_alpha() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(rgb(grey), np.stack([grey] * 3, -1))
    alpha = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    np.testing.assert_array_equal(rgb(alpha), PIXELS)
    assert load(alpha).notes == ("alpha dropped",)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((8, 8, 3)), "[8, 8, 3] of float64"),
        (np.zeros((8, 8, 2), np.uint8), "[8, 8, 2] of uint8"),
        (np.zeros((3, 8, 8), np.uint8), "[3, 8, 8] of uint8"),
        (np.zeros((0, 8, 3), np.uint8), "at least 2"),
        (np.zeros((1, 1), np.uint8), "1 x 1 pixels"),
        (np.zeros((2, 500), np.uint8), "aspect beyond"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: Any, reason: str) -> None:
    with pytest.raises(InputError) as refused:
        load(array)
    assert reason in refused.value.message


@pytest.mark.parametrize("upright", [True, False])
def test_the_callers_image_stays_as_it_is(upright: bool) -> None:
    palette = Image.open(IMAGE).convert("P")
    palette.info["transparency"] = 3
    before = palette.tobytes()
    found = load(palette, upright=upright)
    assert (palette.info["transparency"], palette.mode, palette.tobytes()) == (3, "P", before)
    assert found.notes == ("palette converted to RGB", "alpha dropped")


def test_an_image_object_is_turned_upright_like_its_file() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    Image.fromarray(PIXELS[:20, :30]).save(file, "PNG", exif=exif)
    for upright in (True, False):
        expected = load(file.getvalue(), upright=upright)
        found = load(Image.open(BytesIO(file.getvalue())), upright=upright)
        assert found.notes == expected.notes
        np.testing.assert_array_equal(np.asarray(found.rgb), np.asarray(expected.rgb))


def test_a_broken_image_object_is_an_input_error() -> None:
    broken = Image.open(BytesIO(IMAGE.read_bytes()[:4000]))
    with pytest.raises(InputError, match="cannot be decoded"):
        load(broken)


def test_the_answer_is_that_of_the_file(tmp_path: Path) -> None:
    with Session.open(engine_of(GOLDEN / "llava-v1.5-tiny", tmp_path)) as session:
        from_file, *others = (
            session.answer(Question("What?", image, 8)).token_ids
            for image in (IMAGE, [str(IMAGE)], IMAGE.read_bytes(), Image.open(IMAGE), [PIXELS])
        )
        assert others == [from_file] * 4
        with pytest.raises(InputError, match=r"a\\x00b|null|cannot be decoded"):
            session.answer(Question("What?", "a\0b", 2))
        assert session.answer(Question("nul \0 in a prompt", (), 2)).token_ids
