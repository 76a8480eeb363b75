"""Answers in OpenAI's words: whole, or as a stream of chunks; errors too."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from edgevlm.engines.serving.job import Chosen, Ended, Piece
from edgevlm.engines.serving.limits import Busy, OutOfTime
from edgevlm.engines.serving.web.body import Refused
from edgevlm.toolkit.errors import ConfigError, InputError, OutOfMemory
from edgevlm.toolkit.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


class Wording:
    """How one answer is put: its id, its model, and whether its parts are chunks."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: list[Piece], ended: Ended) -> dict[str, Any]:
        """A chat.completion."""
        message = {"role": "assistant", "content": ended.answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._of(pieces),
            "finish_reason": ended.answer.finish_reason,
        }
        body = {"object": "chat.completion", "choices": [choice], "usage": usage(ended)}
        return self._head | body | _measured(ended)

    def begun(self) -> bytes:
        """The first chunk, which states the role."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> bytes:
        """A chunk with a token's text; nothing while no character is complete."""
        if not piece.token.text and not self._logprobs:
            return b""
        return self._chunk({"content": piece.token.text}, self._of([piece]))

    def ended(self, ended: Ended, *, with_usage: bool) -> bytes:
        """The last chunks."""
        last = self._chunk({}, None, ended.answer.finish_reason, _measured(ended))
        if with_usage:
            body = {"object": "chat.completion.chunk", "choices": [], "usage": usage(ended)}
            last += event(self._head | body)
        return last + DONE

    def _chunk(
        self,
        delta: Mapping[str, str],
        logprobs: Any = None,
        finish: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        body = {"object": "chat.completion.chunk", "choices": [choice]}
        return event(self._head | body | dict(more or {}))

    def _of(self, pieces: list[Piece]) -> Any:
        if not self._logprobs:
            return None
        return {"content": [self._likely(p.token.id, p.chosen) for p in pieces], "refusal": None}

    def _likely(self, token: int, chosen: Chosen | None) -> dict[str, Any]:
        assert chosen is not None
        top = [self._token(i, value) for i, value in chosen.top]
        return self._token(token, chosen.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.special_tokens.get(token) or self._tokenizer.decode([token])
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}


def event(data: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def usage(ended: Ended) -> dict[str, Any]:
    """Tokens of a request."""
    answer = ended.answer
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.token_ids),
        "total_tokens": answer.prompt_tokens + len(answer.token_ids),
        "prompt_tokens_details": {"cached_tokens": ended.reused_tokens},
    }


def _measured(ended: Ended) -> dict[str, Any]:
    """What OpenAI's answers lack: the stages, and notes on images and prompt."""
    answer = ended.answer
    return {"edgevlm": {"timings_ms": answer.timings_ms, "notes": list(answer.notes)}}


def refusal(error: Exception) -> Refused:
    """The status and the words for an error; what a client did not cause is not told in full."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, f"{error.message}; {error.hint}", "rate_limit_error", "busy")
    if isinstance(error, OutOfTime):
        return Refused(504, error.message, "server_error", "timeout")
    if isinstance(error, (InputError, ConfigError)):
        hint = f" ({error.hint})" if error.hint else ""
        return Refused(400, f"{error.message}{hint}", "invalid_request_error")
    if isinstance(error, (MemoryError, OutOfMemory)):
        return Refused(503, "out of memory", "server_error", "out_of_memory")
    return Refused(500, f"the answer failed: {type(error).__name__}", "server_error")


def error_object(refused: Refused) -> dict[str, Any]:
    """The body of an error."""
    return {
        "error": {
            "message": refused.message,
            "type": refused.kind,
            "param": None,
            "code": refused.code,
        }
    }
