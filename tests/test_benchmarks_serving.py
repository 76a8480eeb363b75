"""The clients of the serving benchmark, on a server of the tiny LLaVA-1.5."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import served
from benchmarks.serving_clients import Lost, Reply, Server, _read, load, questions

TOKENS = 6


@pytest.fixture(scope="module")
def server(ready: Path) -> Iterator[Server]:
    pytest.importorskip("fastapi")
    with served(ready / "engine-cpu", Namespace(slots=3, threads=1)) as (opened, together):
        assert together >= 1
        yield opened


def test_answers_of_many_clients_are_those_alone_to_the_last_digit(server: Server) -> None:
    bodies = questions(TOKENS, logprobs=True)[:4]
    alone = [server.ask(body) for body in bodies]
    assert len({reply.said for reply in alone}) == len(alone)
    for reply in alone:
        assert reply.tokens == len(reply.logprobs) == TOKENS
        assert 0 < reply.first_ms <= reply.total_ms
    run = load(server, bodies, clients=5, each=2)
    assert (run.asked, len(run.answers), run.lost) == (10, 10, [])
    assert run.differing(alone) == 0
    assert run.differing(alone[1:] + alone[:1]) == 10
    assert run.tokens == 10 * TOKENS
    figures = run.figures()
    assert figures["tokens_per_s"] > 0 and figures["queue_p99_ms"] >= figures["queue_p50_ms"]
    assert run.peak_mb > 10 and 0 <= run.elsewhere <= 1


def test_a_refused_request_is_a_lost_answer(server: Server) -> None:
    with pytest.raises(Lost, match="400"):
        server.ask(b'{"messages": []}')
    run = load(server, [b"{}"], clients=2, each=1)
    assert (len(run.lost), run.answers) == (2, [])


def test_a_stream_that_breaks_off_is_a_lost_answer() -> None:
    choice = {"delta": {"content": "a"}}
    with pytest.raises(Lost, match="early"):
        _read(iter([(5.0, {"choices": [choice]})]))
    with pytest.raises(Lost, match="over"):
        _read(iter([(5.0, {"choices": [choice]}), (6.0, {"error": "over"})]))


def test_llama_cpps_own_times_say_when_the_first_token_came() -> None:
    usage = {"completion_tokens": 3, "prompt_tokens": 9}
    last = {"choices": [{"delta": {}}], "usage": usage, "timings": {"predicted_ms": 40.0}}
    assert _read(iter([(100.0, last)])) == Reply("", (), 3, 9, 60.0, 100.0, {})
