"""Embeddings over HTTP: those of `edgevlm embed` to the last bit, whoever else asks."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from edgevlm import cli
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.engines.runtime.session import Session
from edgevlm.engines.serving.embedding import (
    Computed,
    EmbeddingEvent,
    EmbeddingJob,
    EmbeddingQueue,
    sizes_alike,
)
from edgevlm.engines.serving.job import Failed
from edgevlm.engines.serving.limits import Busy, Limits, OutOfTime
from edgevlm.engines.serving.web.app import Options
from edgevlm.engines.serving.work import opened
from edgevlm.toolkit.errors import ConfigError, ToolkitError
from edgevlm.toolkit.ops.vocabulary import Array
from tests.engines.serving.asking import held
from tests.engines.serving.conftest import GOLDEN
from tests.engines.serving.served import Served, data_url, listening, serving, user

LIMITS = Limits(
    queue=30,
    body_bytes=200_000,
    image_bytes=100_000,
    image_pixels=50_000,
    images=7,
)


@pytest.fixture(scope="module")
def queue(tower: Path) -> Iterator[EmbeddingQueue]:
    with opened(tower, LIMITS, slots=4, threads=1) as work:
        assert isinstance(work, EmbeddingQueue)
        yield work


@pytest.fixture(scope="module")
def server(tower: Path) -> Iterator[Served]:
    with opened(tower, LIMITS, slots=4, threads=1) as work, listening(work) as port:
        yield Served(port, None)  # type: ignore[arg-type]


@pytest.fixture
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
def expected(tower: Path, photos: list[Path], tmp_path: Path) -> Array:
    """What the verb `embed` writes."""
    out = tmp_path / "features.npz"
    words = ["embed", str(tower), *map(str, photos), "-o", str(out), "--batch", "1", "-q"]
    cli.app(words, standalone_mode=False)
    with np.load(out) as found:
        vectors: Array = found["embeddings"]
    return vectors


def embeddings(server: Served, **fields: Any) -> tuple[int, Any]:
    return server.request("POST", "/v1/embeddings", json.dumps(fields))


def rows(found: Any) -> Array:
    """The vectors of an answer, which comes in order."""
    assert [one.index for one in found.data] == list(range(len(found.data)))
    return np.asarray([one.embedding for one in found.data], np.float32)


def test_embeddings_are_those_of_the_verb(
    client: OpenAI, photos: list[Path], expected: Array
) -> None:
    urls = [data_url(file) for file in photos]
    for form in ("float", "base64"):
        found = client.embeddings.create(model="tiny", input=urls, encoding_format=form)
        if form == "base64":  # which the client hands on as it came, where it was asked for
            texts: list[Any] = [one.embedding for one in found.data]
            vectors = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in texts])
        else:
            vectors = rows(found)
        assert np.array_equal(vectors, expected)
    single = client.embeddings.create(model="tiny", input=urls[3])  # base64, which it decodes
    assert np.array_equal(rows(single), expected[3:4])
    assert single.model == "tiny"
    assert set((single.model_extra or {})["edgevlm"]["timings_ms"]) >= {"queue", "encoder", "total"}


def test_many_clients_get_their_own(server: Served, photos: list[Path], expected: Array) -> None:
    wrong: list[Any] = []

    def ask(number: int) -> None:
        chosen = [(number + step) % 7 for step in range(1 + number % 3)]
        status, found = embeddings(server, input=[data_url(photos[i]) for i in chosen])
        good = status == 200 and np.array_equal(
            np.asarray([one["embedding"] for one in found["data"]], np.float32), expected[chosen]
        )
        if not good:
            wrong.append((status, found))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


PIXEL = "data:image/png;base64,"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "input: Field required"),
        ({"input": []}, "input: expected an image as a data URL"),
        ({"input": 5}, "input: expected an image as a data URL"),
        ({"input": [[1, 2]]}, "input: expected an image as a data URL"),
        ({"input": "a text"}, "input: 'a text' is not read: images come as data:image/"),
        ({"input": ["file:///etc/passwd"]}, "input.0: 'file:///etc/passwd' is not read"),
        ({"input": PIXEL + "!!"}, "input: not base64"),
        ({"input": PIXEL + "AAAA"}, "not an image"),
        ({"input": PIXEL + "A" * 140_000}, "at most 100000 bytes"),
        ({"input": [PIXEL] * 8}, "8 images, a request has 7 at most"),
        ({"input": PIXEL, "dimensions": 8}, "dimensions: an embedding has its tower's 32 channels"),
        ({"input": PIXEL, "encoding_format": "int8"}, "encoding_format"),
        ({"input": PIXEL, "truncate": True}, "truncate: unknown, or not implemented"),
    ],
)
def test_what_is_refused_by_name(fields: dict[str, Any], says: str, server: Served) -> None:
    status, found = embeddings(server, **fields)
    assert (status, says in found["error"]["message"]) == (400, True), found


def test_an_image_that_breaks_off_is_named(
    client: OpenAI, photos: list[Path], tmp_path: Path
) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(photos[0].read_bytes()[:900])
    with pytest.raises(BadRequestError, match="image 2: "):
        client.embeddings.create(model="tiny", input=[data_url(photos[1]), data_url(half)])


def test_pixels_are_counted_before_they_are_decoded(server: Served, tmp_path: Path) -> None:
    Image.new("L", (3000, 3000)).save(tmp_path / "large.png", optimize=True)
    status, found = embeddings(server, input=data_url(tmp_path / "large.png"))
    assert (status, "3000 x 3000" in found["error"]["message"]) == (400, True)


def test_other_addresses(server: Served, photos: list[Path]) -> None:
    status, found = server.request("GET", "/v1/models")
    (model,) = found["data"]
    assert (model["id"], model["kind"], model["channels"]) == ("tiny", "embeddings", 32)
    assert server.request("GET", "/health")[1]["kind"] == "embeddings"
    assert embeddings(server, input=data_url(photos[0]), model="other")[0] == 404
    status, found = server.chat(messages=[{"role": "user", "content": "Hi"}])
    assert (status, found["error"]["code"]) == (400, "unsupported_endpoint")
    assert "answers no questions" in found["error"]["message"]
    figures = server.request("GET", "/metrics")[1]
    assert b"edgevlm_images_total" in figures
    assert b"edgevlm_queue_seconds_bucket" in figures
    assert b"inter_token" not in figures
    described = server.request("GET", "/openapi.json")[1]
    assert "EmbeddingRequest" in described["components"]["schemas"]
    assert "/v1/chat/completions" not in described["paths"]


def test_an_engine_that_answers_embeds_nothing(session: Session, photos: list[Path]) -> None:
    with serving(session, Limits(slots=1), Options("tiny", "secret")) as server:
        url = data_url(photos[0])
        assert embeddings(server, input=url)[0] == 401
        body = json.dumps({"input": url})
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        status, found = server.request("POST", "/v1/embeddings", body, **headers)
        assert (status, found["error"]["code"]) == (400, "unsupported_endpoint")
        assert "vision tower by itself" in found["error"]["message"]


# -- the queue ---------------------------------------------------------------------------------


def asked(
    queue: EmbeddingQueue, images: list[Path], **more: Any
) -> tuple[EmbeddingJob, SimpleQueue[Any]]:
    """A job in the queue, and where its event will come."""
    events = SimpleQueue[Any]()
    job = EmbeddingJob(queue.tower, images, events.put, **more)
    queue.submit(job.prepare())
    return job, events


def waited(events: SimpleQueue[Any]) -> Any:
    """The event, within a minute."""
    return events.get(timeout=60)


def test_images_of_several_requests_share_a_batch(
    queue: EmbeddingQueue, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, real = list[int](), queue.tower.run

    def run(pixels: Array) -> Array:
        sizes.append(len(pixels))
        return real(pixels)

    monkeypatch.setattr(queue.tower, "run", run)
    go, cancelled = threading.Event(), queue.counts.cancelled
    begun = held(monkeypatch, queue.tower, "run", go.is_set)
    first = asked(queue, photos[:1])[1]
    assert begun.wait(60)
    others = [asked(queue, [photo])[1] for photo in photos[1:5]]
    left = asked(queue, photos[:2])
    late = asked(queue, photos[:2], seconds=-1)[1]
    queue.cancel(left[0])
    with pytest.raises(Busy, match="are waiting already"):
        for _ in range(5):
            others.append(asked(queue, photos)[1])
    go.set()
    assert all(isinstance(waited(events), Computed) for events in (first, *others))
    failed = waited(late)
    assert isinstance(failed, Failed) and isinstance(failed.error, OutOfTime)
    assert left[1].empty()
    assert sizes[:2] == [1, 4]
    assert queue.counts.cancelled == cancelled + 1


def test_what_fails_fails_alone(
    queue: EmbeddingQueue, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = queue.tower.run
    monkeypatch.setattr(queue.tower, "run", lambda pixels: real(pixels) * np.float32(np.nan))
    assert "no numbers" in str(waited(asked(queue, photos[:1])[1]).error)
    monkeypatch.setattr(queue.tower, "run", lambda pixels: 1 / 0)
    assert isinstance(waited(asked(queue, photos[:2])[1]).error, ZeroDivisionError)
    monkeypatch.undo()
    assert isinstance(waited(asked(queue, photos[:1])[1]), Computed)


@pytest.mark.parametrize("spoilt", [False, True])
def test_who_hears_of_embeddings_finds_them_counted(
    spoilt: bool, queue: EmbeddingQueue, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoilt:
        monkeypatch.setattr(queue.tower, "run", lambda pixels: np.full((len(pixels), 32), np.nan))
    told, before = SimpleQueue[tuple[type, int]](), queue.counts.answered + queue.counts.failed

    def sink(event: EmbeddingEvent) -> None:
        counts = queue.counts
        told.put((type(event), counts.answered + counts.failed - before + queue.active))

    queue.submit(EmbeddingJob(queue.tower, photos[:2], sink).prepare())
    assert told.get(timeout=60) == (Failed if spoilt else Computed, 1)


def test_numbers_of_images_that_round_otherwise_are_not_used(
    tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Embedder.open(tower, threads=1, batch=6) as found:
        assert sizes_alike(found) == (1, 2, 4, 6)
        real = found.run
        monkeypatch.setattr(
            found, "run", lambda pixels: real(pixels) * np.float32(1 + 1e-6 * (len(pixels) > 2))
        )
        assert sizes_alike(found) == (1, 2)


def test_a_queue_that_is_closed_takes_nothing(tower: Path, photos: list[Path]) -> None:
    with opened(tower, LIMITS, threads=1) as work:
        assert isinstance(work, EmbeddingQueue)
        work.close()
        with pytest.raises(Busy, match="stopping"):
            asked(work, photos[:1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--strict"], "--strict is for answers"),
        (["--speculate"], "--speculate is for answers"),
        (["--max-tokens", "5"], "--max-tokens is for answers"),
        (["--image-cache-mb", "5"], "--image-cache-mb is for answers"),
        (["--slots", "0"], "--slots 0"),
    ],
)
def test_what_the_verb_refuses_for_a_tower(options: list[str], says: str, tower: Path) -> None:
    with pytest.raises(ToolkitError, match=says) as refused:
        cli.app(["serve", str(tower), "--port", "0", *options], standalone_mode=False)
    assert isinstance(refused.value, ConfigError)


def test_a_request_of_a_chat_is_none_of_a_tower(server: Served) -> None:
    """Whatever the image in it."""
    status, found = server.chat(messages=[user("What?", GOLDEN / "image.png")])
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
