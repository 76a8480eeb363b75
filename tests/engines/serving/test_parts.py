"""What a scheduler is made of: keys of prompts, slots, the cache of images, guesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm.engines.backends.state import Allocation, State
from edgevlm.engines.runtime.clock import Clock
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.image_cache import EncodedImage, ImageCache
from edgevlm.engines.serving.job import _chosen
from edgevlm.engines.serving.lookup import Guesses, guess
from edgevlm.engines.serving.prompt_key import common, prompt_key
from edgevlm.engines.serving.slots import GRID, Slots
from edgevlm.toolkit.images import decode
from edgevlm.toolkit.ops.vocabulary import Array
from edgevlm.toolkit.text.prompts import PromptSequence


def image(number: int, rows: int) -> EncodedImage:
    return EncodedImage(number, np.zeros((rows, 4), np.float32), np.arange(rows))


def key(rows: list[int], *images: EncodedImage) -> Array:
    given = np.asarray([rows])
    return prompt_key(PromptSequence(np.full_like(given, 7), given), images)


def test_keys_tell_images_apart_and_the_rows_of_one() -> None:
    text, one, two = [-1, -1], image(3, 2), image(4, 2)
    a = key([*text, 0, 1, -1, 2, 3], one, two)
    assert list(a[:2]) == [7, 7]
    assert len(set(a[a < 0])) == 4
    assert common(a, key([*text, 0, 1, -1], one)) == 5
    assert common(a, key([*text, 0, 1, -1], two)) == 2
    assert common(a, key([*text, 1, 0, -1], one)) == 2
    assert common(a, key([*text, 0, 1, -1, 2, 3], one, one)) == 5
    assert common(a, key(text)) == 2
    assert common(a, key([-1])) == 1


def slots(count: int, spare: int = 0) -> Slots:
    array = np.zeros((count + spare, 1, 128, 1), np.float32)
    return Slots(State({"k": array}, count + spare, Allocation()), count)


def fill(slots: Slots, slot: int, key: Array, value: float) -> None:
    slots.state.arrays["k"][slot, :, : len(key)] = value
    slots.hold(slot, key)


def test_a_prefix_is_used_where_it_is_or_copied() -> None:
    found, prompt = slots(3), np.arange(100, 164)
    first, kept = found.take(prompt)
    assert kept == 0
    fill(found, first, prompt, 1.0)
    second, kept = found.take(np.append(prompt, [1, 2, 3]))  # the other is in use
    assert (second != first, kept) == (True, 64)
    assert (found.state.arrays["k"][second, 0, :64] == 1).all()
    assert (found.state.arrays["k"][second, 0, 64:] == 0).all()
    found.release(first)
    assert found.take(prompt) == (first, 64 - GRID)  # two tokens at least are read again
    assert found.free == 1


def test_a_long_conversation_is_not_given_up_for_a_short_prefix() -> None:
    found, long = slots(2), np.arange(1000, 1100)
    slot, _ = found.take(long)
    fill(found, slot, long, 1.0)
    found.release(slot)
    other, kept = found.take(np.append(long[:32], np.arange(20)))
    assert (other != slot, kept) == (True, 32)
    assert found.held(slot) == 100


def test_slots_that_were_used_longest_ago_go_first() -> None:
    found = slots(3)
    for number in (0, 1, 2, 0):
        key = np.full(40, number)
        slot, _ = found.take(key)
        fill(found, slot, key, number)
        found.release(slot)
    slot, kept = found.take(np.full(40, 9))
    assert kept == 0
    assert found.state.arrays["k"][slot, 0, 0, 0] == 1


def test_slots_change_places_with_all_they_hold() -> None:
    found = slots(2)
    a, b = np.arange(5), np.arange(50, 59)
    first, _ = found.take(a)
    fill(found, first, a, 1.0)
    second, _ = found.take(b)
    fill(found, second, b, 2.0)
    found.release(second)
    found.swap(first, second, 9)
    assert found.held(first) == 9
    assert found.held(second) == 5
    assert found.state.arrays["k"][first, 0, 8, 0] == 2
    assert found.free == 1
    assert found.take(b)[0] == first


def test_the_image_cache_is_bounded_and_finds_what_it_has(session: Session) -> None:
    from PIL import Image

    cache = ImageCache(session, 0)
    generator = np.random.default_rng(2)
    pixels = generator.integers(0, 255, (4, 20, 20, 3), np.uint8)
    images = [decode.load(Image.fromarray(some)) for some in pixels]
    _, (first,) = cache.encode(images[:1], Clock(), tiles=True)
    assert (cache.nbytes, cache.misses) == (0, 1)  # larger than the cache
    cache = ImageCache(session, 2 * first.nbytes)
    for some in (images[0], images[1], images[0], images[2]):
        cache.encode([some], Clock(), tiles=True)
    assert (cache.nbytes, cache.hits, cache.misses) == (2 * first.nbytes, 1, 3)
    _, (again,) = cache.encode([images[1]], Clock(), tiles=True)  # dropped, and not forgotten
    assert (cache.misses, again.number) == (4, 1)
    features, both = cache.encode([images[1], images[3]], Clock(), tiles=True)
    assert [one.number for one in both] == [3, 4]  # two images may be cut otherwise than one
    expected = session.encode([images[1], images[3]], Clock())
    assert np.array_equal(features.rows, expected.rows)
    assert all(map(np.array_equal, features.indices, expected.indices))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 3, 1, 2, 9, 1, 2], [9, 1, 2]),  # the latest
        ([5, 1, 2, 3, 6, 1, 2, 7, 5, 1, 2], [3, 6, 1]),  # the longest
        ([1, 2, -5, 3, 1, 2], []),  # an image stands there
        ([1, 2, 3], []),
        ([1], []),
        ([4, 4, 4, 4], [4]),
        ([4] * 9, [4, 4, 4]),  # not the latest, which one token follows
    ],
)
def test_guesses_follow_what_followed_before(ids: list[int], expected: list[int]) -> None:
    assert guess(np.asarray(ids), 3) == expected


def test_wrong_guesses_make_pauses() -> None:
    guesses = Guesses()
    assert guesses.most() == 3
    guesses.were(3, 3)
    assert guesses.most() == 6
    for _ in range(3):
        guesses.were(0, 3)
    assert [guesses.most() for _ in range(17)] == [0] * 16 + [1]


def test_the_size_of_an_image_is_read_without_decoding(tmp_path: Path) -> None:
    from PIL import Image

    from edgevlm.toolkit.errors import InputError

    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert decode.size_of(data) == (30, 20)
    assert decode.size_of(data[:60]) == (30, 20)
    for broken in (b"", b"%PDF", data[:20]):
        with pytest.raises(InputError):
            decode.size_of(broken)


def test_probabilities_of_many_tokens_are_those_of_float64() -> None:
    logits = np.random.default_rng(0).normal(0, 4, 50_000).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum())
    found = _chosen(logits, 7, 3)
    assert found.logprob == pytest.approx(exact[7], abs=1e-6)
    best = np.argsort(-exact)[:3]
    assert [token for token, _ in found.top] == best.tolist()
    assert [value for _, value in found.top] == pytest.approx(exact[best].tolist(), abs=1e-6)
    assert _chosen(logits, 7, 0).top == ()
