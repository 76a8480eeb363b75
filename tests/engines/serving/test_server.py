"""The server over HTTP: answers are those of the session; what cannot be answered costs nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from edgevlm import cli
from edgevlm.engines.runtime.sampling import Sampling
from edgevlm.engines.runtime.session import Answer, Question, Session
from edgevlm.engines.serving.limits import Limits
from edgevlm.engines.serving.web.app import Options
from edgevlm.toolkit.errors import ToolkitError
from tests.conftest import ROOT
from tests.engines.serving.asking import held, wait_for
from tests.engines.serving.conftest import GOLDEN
from tests.engines.serving.served import JSON, Served, data_url, serving, user

IMAGE = GOLDEN / "image.png"
LIMITS = Limits(
    slots=2,
    queue=40,
    body_bytes=200_000,
    image_bytes=100_000,
    image_pixels=50_000,
    images=2,
    max_tokens=600,
)


@pytest.fixture(scope="module")
def opened(engine: Path) -> Iterator[Session]:
    with Session.open(engine, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def server(opened: Session) -> Iterator[Served]:
    with serving(opened, LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def impatient(opened: Session) -> Iterator[Served]:
    """A server that waits for a second; what it is asked for in time is asked at once."""
    with serving(opened, replace(LIMITS, receive_s=1.0)) as found:
        yield found


@pytest.fixture
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(session: Session, prompt: str, images: Any = (), tokens: int = 12, **more: Any) -> Answer:
    return session.answer(Question(prompt, images, tokens, literal=True, **more))


def test_answers_are_those_of_the_session(client: OpenAI, opened: Session) -> None:
    expected = alone(opened, "What is in the image?", IMAGE)
    found = client.chat.completions.create(
        model="tiny", messages=[user("What is in the image?", IMAGE)], max_tokens=12
    )
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.completion_tokens == 12
    measured = found.model_extra or {}
    assert "time_to_first_token" in measured["edgevlm"]["timings_ms"]


def test_instructions_stand_in_front_of_the_first_question(client: OpenAI, opened: Session) -> None:
    expected = alone(opened, "Be brief.\n\nIn French.\n\nWhy?")
    found = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "In French."}]},
            {"role": "user", "content": "Why?"},
        ],
        max_tokens=12,
    )
    assert found.choices[0].message.content == expected.text


def test_a_stream_joins_to_the_answer(client: OpenAI, opened: Session) -> None:
    expected = alone(opened, "Why?", (), 30, stop=["zz"])
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Why?"}],
        max_completion_tokens=30,
        stop=["zz"],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == expected.text
    assert len(texts) > 5
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)


def test_turns_images_seeds_and_logprobs(client: OpenAI, opened: Session) -> None:
    history = ["First?", "Yes."]
    sampling = Sampling(0.7, 0, 0.9, seed=11)
    expected = opened.answer(
        Question(
            "And this <image> </s>?",
            [IMAGE],
            10,
            sampling,
            history=history,
            literal=True,
            image_turns=[2],
        )
    )
    found = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "First?"},
            {"role": "assistant", "content": "Yes."},
            user("And this <image> </s>?", IMAGE),
        ],
        max_tokens=10,
        temperature=0.7,
        top_p=0.9,
        seed=11,
        logprobs=True,
        top_logprobs=2,
    )
    choice = found.choices[0]
    assert choice.message.content == expected.text
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 10
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_many_clients_get_their_own_answers(server: Served, opened: Session) -> None:
    prompts = [f"Question number {n}?" for n in range(6)]
    expected = [alone(opened, p, IMAGE if n % 2 else ()).text for n, p in enumerate(prompts)]
    wrong: list[Any] = []

    def ask(number: int) -> None:
        n = number % 6
        messages = [user(prompts[n], *([IMAGE] if n % 2 else []))]
        status, found = server.chat(messages=messages, max_tokens=12)
        if status != 200 or found["choices"][0]["message"]["content"] != expected[n]:
            wrong.append((status, found))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    server.wait_until_idle()


def asking(server: Served, **fields: Any) -> socket.socket:
    """A connection on which a long answer was asked for."""
    body = json.dumps({"messages": [user("Tell me")], "max_tokens": 600} | fields)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return server.raw(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())


def streaming(server: Served, tokens: int = 600) -> socket.socket:
    """The same, when the first token has come."""
    found, seen = asking(server, stream=True, max_tokens=tokens), b""
    while b"data:" not in seen:
        seen += found.recv(4096)
    return found


def test_a_client_that_leaves_frees_its_slot(
    server: Served, opened: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, counts = server.scheduler, server.scheduler.counts

    def somebody_begins_or_left() -> bool:  # no answer comes to its end by itself
        begins = scheduler.waiting > 0 or scheduler._reading is not None
        return begins or any(job.cancelled for job in scheduler._begun)

    held(monkeypatch, opened, "decode_batch", somebody_begins_or_left)
    cancelled = counts.cancelled
    for connection in [streaming(server), streaming(server)]:
        connection.close()
    server.wait_until_idle()
    assert counts.cancelled == cancelled + 2
    with asking(server):  # one that waits for a whole answer
        wait_for(lambda: scheduler.active)
    server.wait_until_idle()
    assert counts.cancelled == cancelled + 3


MESSAGES = [{"role": "user", "content": "Hi"}]


def picture(url: str) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "robot"),
        ({"messages": [{"role": "system", "content": "Hi"}]}, "must be the user's"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "Hi"}]}, "in front of all others"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "alternate"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "Hi"}]}, "must be the user's"),
        ({"messages": MESSAGES, "tools": []}, "tools: unknown, or not implemented"),
        ({"messages": MESSAGES, "n": 2}, "n:"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": 601}, "answers with 600"),
        ({"messages": MESSAGES, "max_tokens": "5"}, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 5}, "not both"),
        ({"messages": MESSAGES, "temperature": 3}, "temperature"),
        ({"messages": MESSAGES, "top_p": 0}, "top_p"),
        ({"messages": MESSAGES, "seed": -1}, "seed"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "needs logprobs"),
        ({"messages": MESSAGES, "stream_options": {}}, "needs stream"),
        ({"messages": MESSAGES, "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "no grammar"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "JSON"),
        ({"messages": picture("http://127.0.0.1:1/a.png")}, "fetches no addresses"),
        ({"messages": picture("file:///etc/passwd")}, "opens no files"),
        ({"messages": picture("/etc/passwd")}, "opens no files"),
        ({"messages": picture("data:text/html;base64,AAAA")}, "data:image/"),
        ({"messages": picture("data:image/png;base64,!!!")}, "not base64"),
        ({"messages": picture("data:image/png;base64,AAAA")}, "not an image"),
        ({"messages": picture("data:image/png;base64," + "A" * 140_000)}, "100000 bytes"),
        ({"messages": [user("three", IMAGE, IMAGE, IMAGE)]}, "more than 2 images"),
        ({"messages": [{"role": "user", "content": "a b " * 4000}], "max_tokens": 4}, "context"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    fields: dict[str, Any], says: str, server: Served
) -> None:
    status, found = server.chat(**fields)
    assert status == 400, found
    assert says in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"
    assert server.scheduler.waiting == server.scheduler.active == 0


def test_pixels_are_counted_before_they_are_decoded(server: Served, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (3000, 3000)).save(tmp_path / "large.png", optimize=True)
    status, found = server.chat(messages=picture(data_url(tmp_path / "large.png")))
    assert (status, "3000 x 3000" in found["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ("{", JSON, 400),
        ('{"messages": [' + "[" * 5000, JSON, 400),
        (b"\xff\xfe", JSON, 400),
        ("", JSON, 400),
        ("{}", {"Content-Type": "text/plain"}, 415),
        ("{}", {"X": "y"}, 415),
        ("a" * 200_001, JSON, 413),
        ("{}", JSON | {"Content-Length": "300000"}, 413),
    ],
)
def test_bodies_that_are_none(
    body: Any, headers: dict[str, str], status: int, server: Served
) -> None:
    found = server.request("POST", "/v1/chat/completions", body, **headers)
    assert found[0] == status, found
    assert found[1]["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(impatient: Served) -> None:
    headers = JSON | {"Content-Length": "20"}
    assert impatient.request("POST", "/v1/chat/completions", "{}", **headers)[0] == 408


HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def test_a_body_without_end_is_cut_off(server: Served) -> None:
    """Chunked, and larger than is allowed."""
    connection = server.raw(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    piece = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    with connection:
        for _ in range(7):
            connection.sendall(piece)
        assert b" 413 " in connection.recv(100)


def test_who_still_sends_a_body_that_is_refused_is_told_why(server: Served) -> None:
    """The answer is there before the body is sent, which then meets no closed connection."""
    with server.raw(f"{HEAD}Content-Length: 3000000\r\n\r\n".encode()) as connection:
        assert b" 413 " in connection.recv(4096)
        for _ in range(30):
            connection.sendall(b" " * 100_000)
        while connection.recv(4096):
            pass


def test_slow_heads_are_ended(impatient: Served) -> None:
    server = impatient
    nothing, begun = server.raw(b""), server.raw(b"GET / HTTP/1.1\r\nHo")
    second = server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in second.recv(4096)
    second.sendall(b"GET /hea")
    assert server.request("GET", "/health")[0] == 200
    for connection in (nothing, begun, second):
        seen = b""
        with connection:
            while piece := connection.recv(4096):
                seen += piece
        assert b" 408 " in seen


def test_other_addresses(server: Served) -> None:
    status, found = server.request("GET", "/v1/models")
    assert (status, found["data"][0]["id"]) == (200, "tiny")
    assert server.chat(messages=MESSAGES, model="other")[0] == 404
    assert server.request("GET", "/v1/other")[1]["error"]["message"] == "Not Found"
    assert server.request("GET", "/v1/chat/completions")[0] == 405
    status, page = server.request("GET", "/")
    assert (status, b"edgevlm" in page) == (200, True)
    assert b"//" not in page.replace(b"http://www.w3.org", b"")  # nothing comes from elsewhere
    status, figures = server.request("GET", "/metrics")
    assert status == 200
    assert b"edgevlm_slots 2.0" in figures
    assert b'edgevlm_requests_total{status="404"}' in figures
    assert b"edgevlm_queue_seconds_bucket" in figures
    described = server.request("GET", "/openapi.json")[1]
    assert "ChatRequest" in described["components"]["schemas"]


def test_a_full_queue_is_busy(opened: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(opened, Limits(slots=1, queue=0)) as server:
        refused = Flag()
        held(monkeypatch, opened, "decode_batch", refused.is_set)
        with streaming(server):
            status, found = server.chat(messages=MESSAGES)
            assert (status, found["error"]["code"]) == (429, "busy")
            refused.set()
        server.wait_until_idle()


def test_a_key_is_asked_for(opened: Session) -> None:
    with serving(opened, LIMITS, Options("tiny", "secret")) as server:
        body = json.dumps({"messages": MESSAGES, "max_tokens": 1})
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secrets"}):
            found = server.request("POST", "/v1/chat/completions", body, **JSON, **given)
            assert (found[0], found[1]["error"]["code"]) == (401, "invalid_api_key")
            assert server.request("GET", "/v1/models", None, X="", **given)[0] == 401
            assert server.request("GET", "/metrics", None, X="", **given)[0] == 401
        assert server.request("GET", "/health")[0] == 200
        right = {"Authorization": "Bearer secret"}
        assert server.request("POST", "/v1/chat/completions", body, **JSON, **right)[0] == 200


def test_a_failure_of_the_engine_is_a_server_error(
    opened: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(opened, LIMITS) as server:
        monkeypatch.setattr(opened, "read_piece", lambda *given: 1 / 0)
        status, found = server.chat(messages=MESSAGES)
        assert (status, found["error"]["type"]) == (500, "server_error")
        assert "ZeroDivisionError" in found["error"]["message"]
        monkeypatch.undo()
        assert server.chat(messages=MESSAGES, max_tokens=1)[0] == 200


def test_the_official_client_shows_the_reason(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="alternate"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "assistant", "content": "Hi"}]
        )


def test_the_verb_serves_until_it_is_told_to_stop(engine: Path) -> None:
    command = [sys.executable, "-m", "edgevlm.cli", "serve", str(engine)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--slots", "1", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ,
    )
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    server = Served(int(found["url"].rsplit(":", 1)[1]), None)  # type: ignore[arg-type]
    assert found["model"] == engine.name
    with streaming(server, 300) as connection:  # an answer that has begun comes to its end
        process.send_signal(signal.SIGTERM)
        seen = b""
        while piece := connection.recv(1 << 16):
            seen += piece
        assert b"[DONE]" in seen
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--slots", "0"], "--slots 0"),
        (["--port", "70000"], "--port 70000"),
        (["--api-key", ""], "--api-key is empty"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--grace", "-1"], "--grace -1"),
        (["--strict", "--speculate"], "exclude each other"),
    ],
)
def test_what_the_verb_refuses(options: list[str], says: str, engine: Path) -> None:
    with pytest.raises(ToolkitError, match=says):
        cli.app(["serve", str(engine), *options], standalone_mode=False)
