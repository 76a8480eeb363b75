"""A Triton model repository, held against the Python backend's documented contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import cli
from edgevlm.engines.backends import sessions
from edgevlm.engines.runtime.embedding import Embedder
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Question, Session
from edgevlm.engines.serving.triton_repository import _text
from edgevlm.toolkit.errors import BundleError, ConfigError, ToolkitError
from edgevlm.toolkit.ops.vocabulary import Array
from tests.engines.serving.asking import held, wait_for
from tests.engines.serving.conftest import GOLDEN
from tests.engines.serving.served import data_url
from tests.engines.serving.triton_server import (
    Failure,
    Loaded,
    TritonError,
    TritonModelException,
    loaded,
    parsed,
)

IMAGE = GOLDEN / "image.png"
PROMPT = "What is in the image?"


def deploy(engine: Path, out: Path, *options: str) -> Path:
    """The models of a repository that the verb wrote."""
    words = ["deploy", "triton", str(engine), str(out), "--threads", "1", *options]
    cli.app(words, standalone_mode=False)
    return out / "models"


@pytest.fixture(scope="module")
def answers(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    out = tmp_path_factory.mktemp("answers") / "out"
    with loaded(deploy(engine, out, "--name", "llava.1", "--slots", "2"), "llava.1") as found:
        yield found


@pytest.fixture(scope="module")
def embeddings(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    out = tmp_path_factory.mktemp("embeddings") / "out"
    with loaded(deploy(tower, out, "--name", "clip", "--slots", "4"), "clip") as found:
        yield found


def texts(*values: str | bytes) -> Array:
    return np.asarray([v.encode() if isinstance(v, str) else v for v in values], object)


def asked(prompt: str = PROMPT, *images: bytes, tokens: int = 12, **more: Any) -> dict[str, Array]:
    """Inputs of a request."""
    found = {"prompt": texts(prompt), "max_tokens": np.asarray([tokens], np.int32)}
    return found | ({"image": texts(*images)} if images else {}) | more


def whole(model: Loaded, inputs: dict[str, Array]) -> list[dict[str, Array]]:
    """Every response to a request."""
    request, found, last = model.begin(inputs), list[dict[str, Array]](), False
    while not last:
        outputs, last = model.next(request)
        found.append(outputs)
    return found


@pytest.mark.parametrize("url", [False, True])
def test_one_response_is_the_sessions_answer(url: bool, answers: Loaded, engine: Path) -> None:
    image = data_url(IMAGE).encode() if url else IMAGE.read_bytes()
    (found,) = whole(answers, asked(PROMPT, image))
    with Session.open(engine, threads=1) as session:
        expected = session.answer(Question(PROMPT, IMAGE, 12, literal=True))
    assert found["text"][0].decode() == expected.text
    assert found["token_ids"].tolist() == list(expected.token_ids)
    assert found["finish_reason"][0].decode() == expected.finish_reason
    assert found["prompt_tokens"].tolist() == [expected.prompt_tokens]


def test_responses_of_a_stream_join_to_the_answer(answers: Loaded, engine: Path) -> None:
    sampled = {
        "temperature": np.asarray([0.5], np.float32),
        "top_k": np.asarray([20], np.int32),
        "seed": np.asarray([5], np.int64),
        "stop": texts("zz", "qq"),
        "stream": np.asarray([True]),
    }
    found = whole(answers, asked("Tell me </s>", tokens=20, **sampled))
    with Session.open(engine, threads=1) as session:
        sampling = Sampling(0.5, 20, 1.0, seed=5)
        question = Question("Tell me </s>", (), 20, sampling, stop=["zz", "qq"], literal=True)
        expected = session.answer(question)
    assert "".join(one["text"][0].decode() for one in found) == expected.text
    ids = [number for one in found for number in one["token_ids"].tolist()]
    assert ids == list(expected.token_ids)
    reasons = [one["finish_reason"][0].decode() for one in found]
    assert reasons == [""] * (len(found) - 1) + [expected.finish_reason]


def test_requests_are_answered_at_the_same_time(answers: Loaded, engine: Path) -> None:
    prompts = [f"Question {number}?" for number in range(5)]
    requests = [answers.begin(asked(prompt)) for prompt in prompts]
    found = [answers.next(request)[0]["text"][0].decode() for request in requests]
    with Session.open(engine, threads=1) as session:
        assert found == [session.answer(Question(p, (), 12, literal=True)).text for p in prompts]


def test_a_client_that_leaves_ends_its_answer(
    answers: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = answers._model._scheduler
    cancelled = scheduler.counts.cancelled

    def left() -> bool:
        return any(job.cancelled for job in scheduler._begun)

    held(monkeypatch, scheduler.session, "decode_batch", left, after=2)
    request = answers.begin(asked("Tell me", tokens=600, stream=np.asarray([True])))
    for _ in range(3):  # the first one comes with the prompt
        answers.next(request)
    request.cancelled = True
    tokens = 0
    with pytest.raises(Failure) as failure:
        while True:
            answers.next(request)
            tokens += 1
    assert failure.value.code == TritonError.CANCELLED
    assert tokens <= 1  # the one that was under way
    wait_for(lambda: scheduler.active == 0)
    assert scheduler.counts.cancelled == cancelled + 1


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (asked(PROMPT, b"no image"), "not an image"),
        (asked(PROMPT, b"data:text/html;base64,AAAA"), "data:image/"),
        (asked(PROMPT, b"data:image/png;base64,!"), "not base64"),
        (asked(PROMPT, *[b"x"] * 17), "more than 16"),
        (asked(tokens=0), "max_tokens: 0"),
        (asked(tokens=5000), "max_tokens: 5000"),
        (asked(b"\xff"), "no text in UTF-8"),  # type: ignore[arg-type]
        (asked("a b " * 4000), "context"),
        (asked(temperature=np.asarray([-1], np.float32)), "temperature"),
        (asked(seed=np.asarray([-1], np.int64)), "seed"),
    ],
)
def test_what_cannot_be_answered_is_an_invalid_argument(
    inputs: dict[str, Array], says: str, answers: Loaded
) -> None:
    with pytest.raises(Failure, match=says) as failure:
        whole(answers, inputs)
    assert failure.value.code == TritonError.INVALID_ARG


def test_a_failure_of_the_engine_is_an_internal_error(
    answers: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = answers._model._scheduler
    monkeypatch.setattr(scheduler.session, "read_piece", lambda *given: 1 / 0)
    with pytest.raises(Failure, match="ZeroDivisionError") as failure:
        whole(answers, asked("Another one?"))
    assert failure.value.code == TritonError.INTERNAL


def test_what_has_no_answer_when_the_model_is_unloaded_fails(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = deploy(engine, tmp_path / "out", "--name", "m", "--reference")
    with loaded(models, "m") as model:
        scheduler = model._model._scheduler
        held(monkeypatch, scheduler.session, "decode_batch", lambda: scheduler._closing)
        request = model.begin(asked("Tell me", tokens=600, stream=np.asarray([True])))
        model.next(request)
    with pytest.raises(Failure, match="stopping") as failure:
        while True:
            model.next(request)
    assert failure.value.code == TritonError.UNAVAILABLE


def test_embeddings_of_a_batch(embeddings: Loaded, tower: Path, photos: list[Path]) -> None:
    files = [photo.read_bytes() for photo in photos]
    groups = [files[:3], files[3:4], files[4:7]]
    found = embeddings.infer(*({"image": texts(*group)[:, None]} for group in groups))
    with Embedder.open(tower, threads=1, batch=1) as one:
        expected = np.stack([e.vector for e in one.embed(photos) if e.vector is not None])
    outputs = [each["embedding"] for each in found if not isinstance(each, Failure)]
    assert [len(each) for each in outputs] == [3, 1, 3]
    assert np.array_equal(np.concatenate(outputs), expected)


def test_an_image_that_is_none_fails_its_own_request(
    embeddings: Loaded, photos: list[Path]
) -> None:
    good = {"image": texts(photos[0].read_bytes())[:, None]}
    bad = {"image": texts(photos[0].read_bytes(), b"none")[:, None]}
    found = embeddings.infer(good, bad, None)
    assert not isinstance(found[0], Failure)
    assert isinstance(found[1], Failure) and isinstance(found[2], Failure)
    assert found[1].code == TritonError.INVALID_ARG and "not an image" in str(found[1])
    assert found[2].code == TritonError.CANCELLED


def test_the_graph_alone_gives_the_same(tower: Path, tmp_path: Path, photos: list[Path]) -> None:
    """The file alone, as Triton's own backend for ONNX Runtime opens it: no engine, no runner."""
    folder = deploy(tower, tmp_path / "out", "--name", "clip") / "clip_pixels"
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config["backend"], config["max_batch_size"] >= 1) == ("onnxruntime", True)
    session = sessions.open_session(folder / "1" / "model.onnx")
    for ports, stated in ((session.get_inputs(), "input"), (session.get_outputs(), "output")):
        (port,), (told,) = ports, config[stated]
        assert port.name == told["name"]
        assert [str(n) for n in port.shape[1:]] == told["dims"]
        assert isinstance(port.shape[0], str)  # any batch
    with Embedder.open(tower, threads=1, batch=1) as one:
        pixels = np.stack([one.pixels(photo) for photo in photos])
        expected = np.concatenate([one.run(image[None]) for image in pixels])
    (found,) = session.run(["embedding"], {"pixels": pixels})
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_what_is_written(tower: Path, engine: Path, tmp_path: Path) -> None:
    models = deploy(engine, tmp_path / "vlm", "--name", "m", "--reference", "--replicas", "2")
    config = parsed((models / "m" / "config.pbtxt").read_text())
    assert config["parameters"]["engine"]["string_value"] == str(engine)
    assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
    assert "dynamic_batching" not in config  # the scheduler batches by itself
    page = (tmp_path / "vlm" / "README.md").read_text()
    assert f"-v {engine}:{engine}:ro" in page
    assert "not on a running server" in page
    assert (tmp_path / "vlm" / "requirements.txt").read_text() == "edgevlm[cpu]\n"
    models = deploy(tower, tmp_path / "tower")
    (names,) = [sorted(path.name for path in models.iterdir())]
    assert names == ["engine", "engine_pixels"]
    config = parsed((models / "engine" / "config.pbtxt").read_text())
    assert config["max_batch_size"] >= 1 and "dynamic_batching" in config


def test_names_of_folders_are_written_as_text(tmp_path: Path) -> None:
    odd = 'a "b" \\ é\n'
    assert parsed(f"name: {_text(odd)}")["name"] == odd


def test_an_engine_that_is_damaged_is_not_loaded(engine: Path, tmp_path: Path) -> None:
    models = deploy(engine, tmp_path / "out", "--name", "m")
    weights = next((models / "m/1/engine").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(TritonModelException, match="damaged"), loaded(models, "m"):
        pass


@pytest.mark.parametrize(
    ("source", "options", "kind", "says"),
    [
        ("engine", ["--name", "a/b"], ConfigError, "cannot be a folder"),
        ("engine", ["--slots", "0"], ConfigError, "--slots 0"),
        ("engine", ["--host", "0.0.0.0"], ConfigError, "--host is for deploy ray"),
        ("engine", ["--port", "1"], ConfigError, "--port is for deploy ray"),
        ("bundle", [], BundleError, "is not an engine"),
    ],
)
def test_what_is_refused(
    source: str,
    options: list[str],
    kind: type[ToolkitError],
    says: str,
    engine: Path,
    tmp_path: Path,
) -> None:
    places = {"engine": engine, "bundle": engine.parent / "bundle"}
    with pytest.raises(kind, match=says):
        deploy(places[source], tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
