"""The HTTP application: the OpenAI API's completions and chat completions, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from trainer.common.errors import one_line
from trainer.common.strict_json import dumps
from trainer.serve.answers import Answer, Answers, Asked, Piece, pieces
from trainer.serve.engine import Engine
from trainer.serve.metrics import ServerMetrics
from trainer.serve.requests import Chat, Completion, RequestError, invalid
from trainer.serve.sampling import Sampling
from trainer.serve.text import chat_text

LARGEST_BODY = 2**20
"""Bytes of the largest body of a request."""


class Service:
    """Answers requests.

    Args:
        engine: The model.
        tokenizer: Its tokenizer.
        name: The name of the model for clients.
        api_key: What requests must have as a bearer token; None if they need nothing.
    """

    def __init__(self, engine: Engine, tokenizer: Any, name: str, api_key: str | None):
        self.engine, self.tokenizer, self.name, self._api_key = engine, tokenizer, name, api_key
        self.metrics = ServerMetrics(engine)
        self.started = int(time.time())

    def check_key(self, request: Request) -> None:
        """Raise RequestError if a request has not the right key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key is not None and not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise RequestError("Incorrect API key provided", None, "invalid_api_key", 401)

    def model(self) -> dict[str, Any]:
        """Return what clients may know of the model."""
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "unipool"}

    def check_model(self, name: str) -> None:
        """Raise RequestError if this is not the name of the model."""
        if name != self.name:
            raise RequestError(f"The model '{name}' does not exist", "model", "model_not_found", 404)

    def asked(self, body: Completion | Chat, prompts: list[list[int]], limit: int | None, param: str) -> Asked:
        """Return what a request asks for.

        Args:
            body: The request.
            prompts: The tokens of its prompts.
            limit: The largest number of new tokens; None: as many as the window holds.
            param: The parameter that has the prompt.

        Raises:
            RequestError: There is too little room in the window, or in the queue.
        """
        window, longest = self.engine.window, max(map(len, prompts))
        new = limit or 1
        if longest + new > window:
            raise RequestError(
                f"This model's maximum context length is {window} tokens. However, you requested {longest + new} "
                f"tokens ({longest} in the {param}, {new} in the completion). Please reduce their number.",
                param,
                "context_length_exceeded",
            )
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
        sampling = Sampling(limit or window - longest, body.temperature, body.top_k, body.top_p, seed)
        asked = Asked(prompts, body.n, sampling, body.stops)
        self.engine.admit(asked.answers)
        self.metrics.prompt_tokens.inc(asked.prompt_tokens)
        return asked

    def prompt(self, text: str | list[int], param: str) -> list[int]:
        """Return the tokens of a prompt; an empty one starts a document."""
        if isinstance(text, str):
            text = self._encoded(text, param)
        largest = self.engine.vocabulary - 1
        if not all(0 <= token <= largest for token in text):
            raise RequestError(f"'{param}' has a token that is not from 0 to {largest}", param)
        return text or [self.tokenizer.bos_token_id]

    def chat_prompt(self, body: Chat) -> list[int]:
        """Return the tokens of a chat."""
        if not self.tokenizer.chat_template:
            raise RequestError("This model has no chat template; use /v1/completions", "messages", "no_chat_template")
        messages = [message.plain() for message in body.messages]
        for message in messages:
            message["role"] = message["role"].replace("developer", "system")
        try:
            text = chat_text(self.tokenizer, messages)
        except Exception as error:  # templates refuse conversations by errors of their own
            raise RequestError(f"The chat template refuses these messages: {one_line(error)}", "messages") from None
        return self.prompt(self._encoded(text, "messages", add_special_tokens=False), "messages")

    def _encoded(self, text: str, param: str, **settings: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(f"'{param}' has half of a surrogate pair", param) from None
        return list(self.tokenizer(text, **settings)["input_ids"])

    async def watched(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of the answers, and measure them."""
        started, first = time.perf_counter(), True
        async with aclosing(pieces(self.engine, self.tokenizer, asked)) as made:
            async for piece in made:
                self.metrics.new_tokens.inc(piece.tokens)
                if first and piece.text:
                    self.metrics.first.observe(time.perf_counter() - started)
                    first = False
                yield piece
        self.metrics.whole.observe(time.perf_counter() - started)

    async def respond(self, request: Request, body: Completion | Chat, asked: Asked, form: Form) -> Response:
        """Return the whole answers, or a stream of them."""
        if body.stream:
            stream = self._events(asked, form, body.usage_in_stream)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        answers = Answers([Answer() for _ in range(asked.answers)])

        async def collect() -> None:
            async with aclosing(self.watched(asked)) as made:
                async for piece in made:
                    answers.add(piece)

        await _unless_disconnected(request, collect())
        choices = [form.choice(number, answer) for number, answer in enumerate(answers.answers)]
        return JSONResponse(form.head() | {"choices": choices, "usage": _usage(asked, answers.tokens)})

    async def _events(self, asked: Asked, form: Form, usage: bool) -> AsyncGenerator[str, None]:
        """Yield the events of a stream."""
        empty = {"usage": None} if usage else {}
        tokens = 0
        try:
            for number in range(asked.answers):
                if (opening := form.opening(number)) is not None:
                    yield _event(form.head(chunk=True) | {"choices": [opening]} | empty)
            async with aclosing(self.watched(asked)) as made:
                async for piece in made:
                    tokens += piece.tokens
                    if piece.text or piece.finish:
                        yield _event(form.head(chunk=True) | {"choices": [form.part(piece)]} | empty)
            if usage:
                yield _event(form.head(chunk=True) | {"choices": [], "usage": _usage(asked, tokens)})
        except RequestError as error:
            yield _event(error.body)
        yield "data: [DONE]\n\n"


class Form:
    """The form of the answers of /v1/completions.

    Args:
        service: The service.
        echoes: What each answer begins with.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, echoes: Sequence[str] = ()):
        self._shared = {"created": int(time.time()), "model": service.name}
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._echoes = echoes

    def head(self, chunk: bool = False) -> dict[str, Any]:
        """Return what every body begins with."""
        return {"id": self._id, "object": self.chunk_kind if chunk else self.kind, **self._shared}

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        """Return a whole answer."""
        text = (self._echoes[number] if self._echoes else "") + answer.text
        return {"index": number, "text": text, "logprobs": None, "finish_reason": answer.finish}

    def opening(self, number: int) -> dict[str, Any] | None:
        """Return what a stream has before an answer's first text; None for nothing."""
        if not self._echoes:
            return None
        return {"index": number, "text": self._echoes[number], "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return a piece of an answer."""
        return {"index": piece.answer, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}


class ChatForm(Form):
    """The form of the answers of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        """Return a whole answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": number, "message": message, "logprobs": None, "finish_reason": answer.finish}

    def opening(self, number: int) -> dict[str, Any] | None:
        """Return the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        """Return a piece of an answer."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.answer, "delta": delta, "logprobs": None, "finish_reason": piece.finish}


def application(service: Service) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="unipool serve", openapi_url=None)
    key = [Depends(service.check_key)]

    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", dependencies=key)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}", dependencies=key)
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @app.post("/v1/completions", dependencies=key)
    async def completions(request: Request, body: Completion) -> Response:
        service.check_model(body.model)
        given = body.prompts()
        service.engine.admit(len(given) * body.n)  # before many are encoded
        prompts = [service.prompt(prompt, "prompt") for prompt in given]
        echoed = [prompt for prompt in prompts for _ in range(body.n) if body.echo]
        echoes = [service.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in echoed]
        asked = service.asked(body, prompts, body.max_tokens, "prompt")
        return await service.respond(request, body, asked, Form(service, echoes))

    @app.post("/v1/chat/completions", dependencies=key)
    async def chat_completions(request: Request, body: Chat) -> Response:
        service.check_model(body.model)
        service.engine.admit(body.n)  # before messages are encoded
        asked = service.asked(body, [service.chat_prompt(body)], body.limit, "messages")
        return await service.respond(request, body, asked, ChatForm(service))

    @app.exception_handler(RequestError)
    async def refused(_request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body, error.status, {"retry-after": "1"} if error.status == 503 else None)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return await refused(request, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return await refused(request, RequestError(what, status=error.status_code))

    @app.exception_handler(Exception)
    async def failed(request: Request, _error: Exception) -> Response:
        """Starlette logs the error."""
        return await refused(request, RequestError("The server had an error while processing your request", status=500))

    app.add_middleware(Gate, metrics=service.metrics)
    return app


class Gate:
    """Counts responses, and refuses bodies that are too large."""

    def __init__(self, app: Any, metrics: ServerMetrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def measured() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(413, f"the body has more than {LARGEST_BODY:,} bytes")
            return message

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, measured, counted)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Do work; end it if the client has gone."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.5))[0]:
            if await request.is_disconnected():
                raise RequestError("the client has closed the connection", status=499)
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _usage(asked: Asked, tokens: int) -> dict[str, int]:
    prompt = asked.prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _event(body: dict[str, Any]) -> str:
    return f"data: {dumps(body)}\n\n"
