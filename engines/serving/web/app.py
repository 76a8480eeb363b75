"""The server's addresses: OpenAI's chat completions, embeddings, models; health, metrics, a page.

Nothing here computes: a body is read and prepared in threads beside the event loop, and the thread
of the scheduler, or of a tower's queue, answers. No request reaches a path, an address or a pickle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from edgevlm.engines.serving.embedding import EmbeddingQueue
from edgevlm.engines.serving.web.body import Refused, invalid
from edgevlm.engines.serving.web.chats import Chats
from edgevlm.engines.serving.web.embeddings import EmbeddingRequest, Embeddings
from edgevlm.engines.serving.web.reply import error_object
from edgevlm.engines.serving.web.schema import ChatRequest
from edgevlm.engines.serving.web.server import Exchange, Server
from edgevlm.engines.serving.web.server import Options as Options
from edgevlm.engines.serving.work import Work

_NO_CHAT = (
    "{} is a vision tower by itself: it embeds images (POST /v1/embeddings) and answers no "
    "questions"
)
_NO_EMBEDDINGS = (
    "{} answers questions (POST /v1/chat/completions); embeddings are those of a vision tower by "
    "itself"
)


def create(work: Work, options: Options) -> FastAPI:
    """The application around an engine's work, which the caller closes."""
    server = Server(work, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(title="edgevlm", docs_url=None, redoc_url=None, lifespan=lifespan, version="1")
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    body = (
        _add_embeddings(app, server) if isinstance(work, EmbeddingQueue) else _add_chat(app, server)
    )
    _add_models(app, server)
    _add_state(app, server)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.exception_handler(HTTPException)
    async def refused(request: Request, odd: HTTPException) -> Response:
        found = invalid(str(odd.detail), odd.status_code)
        return JSONResponse(error_object(found), odd.status_code, odd.headers)

    @app.exception_handler(Refused)
    async def unauthorized(request: Request, odd: Refused) -> Response:
        return JSONResponse(error_object(odd), odd.status)

    app.openapi = partial(_described, app, body)  # type: ignore[method-assign]
    return app


# The page is one file, and loads nothing from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; " + (
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
_ANSWERS = {
    "description": "a chat.completion, or with `stream` its chunks",
    "content": {"application/json": {}, "text/event-stream": {}},
}
_LIST = {"description": "a list of embeddings", "content": {"application/json": {}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": "an error in OpenAI's words"}
    for status in (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
}


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """How a body that we read ourselves is described."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": True, "content": content}}


def _add_chat(app: FastAPI, server: Server) -> type[BaseModel]:
    """Answers to conversations; returns what a body is."""
    assert not isinstance(server.work, EmbeddingQueue)
    chats = Chats(server, server.work)

    @app.post(
        "/v1/chat/completions",
        openapi_extra=_body(ChatRequest),
        responses=_ERRORS | {200: _ANSWERS},
        response_class=JSONResponse,
    )
    async def chat(request: Request) -> Response:
        """Answer a conversation with images."""
        return Exchange(server, request, chats.answer)

    _add_refusal(app, server, "/v1/embeddings", _NO_EMBEDDINGS)
    return ChatRequest


def _add_embeddings(app: FastAPI, server: Server) -> type[BaseModel]:
    """Embeddings of images; returns what a body is."""
    assert isinstance(server.work, EmbeddingQueue)
    embeddings = Embeddings(server, server.work)

    @app.post(
        "/v1/embeddings",
        openapi_extra=_body(EmbeddingRequest),
        responses=_ERRORS | {200: _LIST},
        response_class=JSONResponse,
    )
    async def embed(request: Request) -> Response:
        """Embed images."""
        return Exchange(server, request, embeddings.answer)

    _add_refusal(app, server, "/v1/chat/completions", _NO_CHAT)
    return EmbeddingRequest


def _add_refusal(app: FastAPI, server: Server, address: str, why: str) -> None:
    """An address that other engines have."""

    @app.post(address, include_in_schema=False)
    async def refuse(request: Request) -> Response:
        server.check_key(request)
        found = invalid(why.format(server.options.name), code="unsupported_endpoint")
        return server.error(found)


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", responses={401: _ERRORS[401]})
    async def models(request: Request) -> dict[str, Any]:
        """The one model that is served. kind: chat or embeddings."""
        server.check_key(request)
        model = {"id": server.options.name, "object": "model", "owned_by": "edgevlm"}
        more: dict[str, Any] = {"created": server.created, "kind": server.kind}
        if isinstance(server.work, EmbeddingQueue):
            more["channels"] = server.work.tower.model.channels
        return {"object": "list", "data": [model | more]}


def _add_state(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether requests are taken."""
        work, named = server.work, {"model": server.options.name, "kind": server.kind}
        waiting = work.waiting  # first: a request that begins meanwhile is not left out
        slots = {"slots": work.limits.slots, "active": work.active}
        return {"status": "ok", **named, **slots, "waiting": waiting}

    @app.get("/metrics", response_class=Response, responses={401: _ERRORS[401]})
    async def metrics(request: Request) -> Response:
        """Figures in Prometheus' text format."""
        server.check_key(request)
        text, kind = server.metrics.text()
        return Response(text, media_type=kind)


def _described(app: FastAPI, body: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description; bodies are read by ourselves, so what they are is added here."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        model = body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas = described.setdefault("components", {}).setdefault("schemas", {})
        schemas |= model.pop("$defs", {})
        schemas[body.__name__] = model
        app.openapi_schema = described
    return app.openapi_schema
