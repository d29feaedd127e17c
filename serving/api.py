"""The HTTP API: routes, limits, keys, the access log, and the bridge between the engine's thread and the event loop.

It knows HTTP and requests, and nothing of models, caches or steps. The engine hands over one list of outputs a step,
and one callback on the loop turns all of them into text and events, so that the threads meet once a step and not once
a token. What a client may cost is limited before it is paid for: bodies are counted as they are read, text is
encoded off the loop, and a reader who does not read is dropped.
"""

import asyncio
import hmac
import json
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import cli
import serving.request
from sampling import SamplingParams, stray_token
from serving import protocol
from serving.engine import Engine, Overloaded, Stopping
from serving.metrics import Metrics
from serving.protocol import ApiError, ChatRequest, CompletionRequest
from serving.replies import Reply
from serving.request import Output
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from serving.constraints import Grammars

log = logging.getLogger("tachyon")
access_log = logging.getLogger("tachyon.access")

BODY_TIMEOUT_S = 30.0  # to send a body
SEND_TIMEOUT_S = 60.0  # for a reader to take ...
PIECE = 1 << 18  # ... so many bytes of an answer
MAX_REPORTED = 1 << 22  # logprobs of a request's tokens and their alternatives
MAX_FAILURES = 3  # steps that fail one after the other until the device counts as lost ...
LOST_S = 60.0  # ... for so long, if nothing is asked of it
OPENAI_SAMPLING = SamplingParams(temperature=1.0)
OPEN_PATHS = ("/", "/health")  # need no key
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What the command line decides of the server; the engine has options of its own."""

    host: str = cli.option("127.0.0.1", "address to listen at; any but a loopback address lets others in")
    port: int = cli.option(8000, "port to listen at; 0 takes a free one")
    api_key: tuple[str, ...] = cli.option((), "answer only requests with this key; may be given several times")
    served_name: str | None = cli.option(None, "the model's name in the API (default: what --checkpoint says)")
    sampling_defaults: str = cli.option(
        "model",
        "what a request leaves out of its sampling: the model's own generation_config.json's, or OpenAI's",
        choices=("model", "openai"),
    )
    cors_origin: tuple[str, ...] = cli.option((), "let pages of this origin use the API; may be given several times")
    max_requests: int = cli.option(2048, "requests answered at a time; others get status 429")
    max_answers: int = cli.option(128, "answers that one request may ask for: n for each of its prompts")
    max_prompt_tokens: int | None = cli.option(None, "tokens in a prompt (default: what the context holds)")
    max_body_mb: float = cli.option(4.0, "size of a request's body")
    drain_s: float = cli.option(60.0, "how long running requests may go on after SIGTERM")

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_answers", "max_prompt_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
        if not 0.0 <= self.drain_s < math.inf:
            raise ValueError(f"--drain-s must be at least 0; got {self.drain_s}")
        if not 0.0 < self.max_body_mb <= 1024.0:
            raise ValueError(f"--max-body-mb must be above 0 and at most 1024; got {self.max_body_mb}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be between 0 and 65535; got {self.port}")
        if any(not key.isascii() or not key.isprintable() or not key.strip() for key in self.api_key):
            raise ValueError("--api-key must be printable ASCII and not empty")
        for origin in self.cors_origin:
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"--cors-origin {origin} is none; write https://HOST, http://HOST:PORT or *")

    def sampling(self, own: Mapping[str, float]) -> SamplingParams:
        """For what requests leave open: as the official API has it, and over that the checkpoint's `own` settings."""
        if self.sampling_defaults == "openai" or not own:
            return OPENAI_SAMPLING
        try:
            params = protocol.with_settings(OPENAI_SAMPLING, own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"generation_config.json: {error}; --sampling-defaults openai does without") from None
        settings = ", ".join(f"{name} {value}" for name, value in own.items())
        log.info(f"unless a request says otherwise, it is sampled with this model's {settings}")
        return params


@dataclass(kw_only=True)
class Visit:
    """One HTTP request, as the access log shows it."""

    id: str = field(default_factory=lambda: secrets.token_hex(12))
    start: float = field(default_factory=time.monotonic)
    status: int = 499  # what servers log where the client left first
    held: int = 0  # bytes of its body, so far
    reply: Reply | None = None


class Service:
    """The engine, as HTTP requests see it; `sampling` is for what they leave open of theirs."""

    def __init__(
        self,
        make_engine: Callable[[Callable[[list[Output]], None]], Engine],
        tokenizer: Tokenizer,
        *,
        name: str,
        eos_ids: Sequence[int],
        vocab_size: int,
        max_seq_len: int,
        options: ServerOptions,
        sampling: SamplingParams = OPENAI_SAMPLING,
    ) -> None:
        self.tokenizer, self.name, self.eos_ids = tokenizer, options.served_name or name, frozenset(eos_ids)
        self.vocab_size, self.max_seq_len, self.options = vocab_size, max_seq_len, options
        self.sampling = sampling
        self.max_prompt_tokens = min(options.max_prompt_tokens or max_seq_len, max_seq_len)
        self.engine = make_engine(self.deliver)
        self.metrics = Metrics(self.name, self.engine.stats)
        self.created = int(time.time())
        self.draining = False
        self.replies: dict[str, tuple[Reply, int]] = {}  # by the engine's request id, and which prompt that is
        self.workers = ThreadPoolExecutor(2, thread_name_prefix="prepare")  # templates, encoding, grammars
        self._loop: asyncio.AbstractEventLoop | None = None
        self._grammars: Grammars | None = None

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.stop, drain_s=0.0)
        self.workers.shutdown(cancel_futures=True)

    # ---- From HTTP to the engine ------------------------------------------------------------------------------------

    def prepare(
        self, body: ChatRequest | CompletionRequest, id: str, arrived: float
    ) -> tuple[Reply, list[serving.request.Request]]:
        """What to ask of the engine, and what will become its answer; ApiError where it cannot be asked. Any thread."""
        self.check_model(body.model)
        chat = isinstance(body, ChatRequest)
        self._check_size(body, 1 if chat else len(body.prompts))
        try:
            prompts = [self.chat_ids(body)] if chat else [self.prompt_ids(prompt) for prompt in body.prompts]
            constraint = self._constraint(body)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        for field_name, tokens in (("logit_bias", bias), ("stop_token_ids", body.stop_token_ids or ())):
            self.check_tokens(tokens, field_name)
        lengths = [self._room(len(ids), body.length, "messages" if chat else "prompt") for ids in prompts]
        if body.alternatives is not None:  # they take memory until they are reported
            most = MAX_REPORTED // (len(prompts) * body.n * (body.alternatives + 1))
            if body.length is not None and body.length > most:
                message = f"more than {MAX_REPORTED} logprobs to report; ask for less n, max_tokens or alternatives"
                raise ApiError(400, message, param="logprobs")
            lengths = [min(length, most) for length in lengths]
        stop_ids = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else self.eos_ids)
        params = body.params(secrets.randbits(62) if body.seed is None else body.seed, self.sampling)
        id = ("chatcmpl-" if chat else "cmpl-") + id
        requests = [
            serving.request.Request(
                id=f"{id}-{index}",
                prompt=ids,
                params=params,
                n=body.n,
                max_new_tokens=length,
                stop_ids=stop_ids,
                priority=body.priority,
                salt=body.cache_salt,
                logprobs=body.alternatives,
                logit_bias=bias,
                constraint=constraint,
                arrived=arrived,
            )
            for index, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        echo = None
        if not chat and body.echo:
            echo = [self._shown(prompt) for prompt in body.prompts]
        reply = Reply(
            kind="chat" if chat else "text",
            id=id,
            model=self.name,
            tokenizer=self.tokenizer,
            arrived=arrived,
            prompts=prompts,
            echo=echo,
            n=body.n,
            stop=body.stop,
            stream=body.stream,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            logprobs=body.alternatives is not None,
        )
        return reply, requests

    def _check_size(self, body: ChatRequest | CompletionRequest, prompts: int) -> None:
        """Refuse what would take too much to answer, before anything is done for it."""
        answers, most = prompts * body.n, self.options.max_answers
        if not prompts:
            raise ApiError(400, "the prompt is empty; give at least one", param="prompt")
        if answers > most:
            raise ApiError(400, f"{prompts} prompts with n = {body.n}: 1 to {most} answers at a time", param="n")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"there is no model {name[:200]!r} here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def chat_ids(self, body: protocol.Conversation) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions", param="messages")
        return self.tokenizer.chat(
            [message.model_dump(exclude_none=True) for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            **(body.chat_template_kwargs or {}),
        )

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        self.check_tokens(prompt, "prompt")
        return prompt

    def _shown(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        return self.tokenizer.decode(prompt, skip_special=False)

    def check_tokens(self, tokens: Collection[int], param: str) -> None:
        if (token := stray_token(tokens, self.vocab_size)) is not None:
            raise ApiError(400, f"{token} is not one of the {self.vocab_size} tokens", param=param)

    def _room(self, prompt: int, asked: int | None, param: str) -> int:
        """How many tokens the answer to a prompt of this length may have."""
        if prompt == 0:
            raise ApiError(400, "the prompt is empty; give at least one token", param=param)
        room = self.max_seq_len - prompt
        if prompt > self.max_prompt_tokens or room < (asked or 1):
            answer = f" and {asked} more are asked for" if asked else ""
            limit = f", of which a prompt may take {self.max_prompt_tokens}"
            message = (
                f"the prompt has {prompt} tokens{answer}; the context holds {self.max_seq_len}"
                f"{limit if self.max_prompt_tokens < self.max_seq_len else ', answer included'}"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return asked or room

    def _constraint(self, body: protocol.Generation) -> Callable[[], serving.request.Constraint] | None:
        if (spec := body.constraint_spec()) is None:
            return None
        if self._grammars is None:
            try:
                from serving.constraints import Grammars
            except ModuleNotFoundError as error:
                raise ApiError(400, f"this server lacks {error.name}, which holds answers to a grammar") from None
            self._grammars = Grammars(self.tokenizer, vocab_size=self.vocab_size, eos_ids=sorted(self.eos_ids))
        return self._grammars.constraint(*spec)

    def submit(self, reply: Reply, requests: Sequence[serving.request.Request]) -> None:
        for index, request in enumerate(requests):
            self.replies[request.id] = (reply, index)
        try:
            for request in requests:
                self.engine.add(request)
        except Stopping as error:
            raise ApiError(503, str(error)) from None
        except Overloaded as error:
            raise self.overloaded(str(error), error.retry_after) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    def overloaded(self, message: str, retry_after: float = 1.0) -> ApiError:
        seconds = str(max(1, math.ceil(retry_after)))
        return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": seconds})

    def release(self, reply: Reply, requests: Sequence[serving.request.Request]) -> None:
        """Forget a reply; whatever of it still runs is ended."""
        unfinished = {choice.prompt for choice in reply.choices if choice.finish_reason is None}
        for index, request in enumerate(requests):
            if self.replies.pop(request.id, None) is not None and index in unfinished:
                self.engine.abort(request.id)

    # ---- From the engine to HTTP ------------------------------------------------------------------------------------

    def deliver(self, outputs: list[Output]) -> None:
        """Called by the engine's thread, once a step."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs, time.monotonic())
        except RuntimeError:  # the loop is closed: nobody waits for these any more
            log.debug("outputs after the end of the server: %d", len(outputs))

    def _dispatch(self, outputs: list[Output], now: float) -> None:
        metrics, replies = self.metrics, self.replies
        for output in outputs:
            reply, prompt = replies.get(output.request_id, (None, 0))
            if reply is None:
                continue
            try:
                choice = reply.feed(prompt, output, now)
            except Exception:  # one answer's mistake is not the others'
                log.exception("an answer could not be written")
                reply.error = ApiError(500, "the server made a mistake; its log has more")
                reply.wake()
                continue
            if choice is None:
                continue
            if choice.gained:
                if choice.newest is None:
                    metrics.first_token(now - reply.arrived)
                    reply.queued_s = max(reply.queued_s, output.queued_s)
                else:
                    metrics.next_token((now - choice.newest) / choice.gained, choice.gained)
                choice.newest = now
            if choice.finish_reason is not None:
                metrics.finished[choice.finish_reason] += 1
                if output.finish_reason is None:  # at a stop string, of which the engine knows nothing
                    self.engine.abort(output.request_id, output.index)
            elif reply.behind:
                reply.cut()

    @property
    def running_requests(self) -> int:
        return len({id(reply) for reply, _ in self.replies.values()})

    def end_all(self, message: str) -> None:
        """Give up what still runs."""
        for reply, _ in list(self.replies.values()):
            reply.fail(ApiError(503, message))


class Answering(Response):
    """Runs a request through the engine as the ASGI response to it: one JSON body, or a stream of events."""

    def __init__(
        self, service: Service, visit: Visit, reply: Reply, requests: Sequence[serving.request.Request]
    ) -> None:
        self.service, self.reply, self.requests = service, reply, requests
        self.background = None
        visit.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self.reply
        reply.reader = asyncio.current_task()
        watcher = asyncio.create_task(self._watch(receive))
        try:
            self.service.submit(reply, self.requests)
            await (self._stream(send) if reply.stream else self._whole(send))
        except asyncio.CancelledError:
            if not reply.was_cut:
                raise
            self._abort(scope)
        except TimeoutError:
            self._abort(scope)
        finally:
            watcher.cancel()
            self.service.release(reply, self.requests)
            self._count()

    @staticmethod
    def _abort(scope: Scope) -> None:
        if (transport := scope.get("transport")) is not None:
            transport.abort()  # closing would wait until the reader has read

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.reply.disconnected = True
        self.reply.wake()

    async def _whole(self, send: Send) -> None:
        reply = self.reply
        await reply.wait()
        if reply.error is not None:
            raise reply.error
        if not reply.disconnected:
            response = await asyncio.to_thread(lambda: JSONResponse(reply.body()))  # logprobs make it long
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": response.raw_headers})
            await self._send_body(send, response.body, more=False)

    async def _stream(self, send: Send) -> None:
        """Events as they come. The status waits for the first one, so that a request that fails before has its own."""
        reply, headers = self.reply, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await reply.wait()
        if reply.error is not None and not reply.tokens:
            raise reply.error
        reply.sending = True  # waits where an answer before, on the same connection, has not been read
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        over = False
        while not over:
            reply.sending = True
            data, over = reply.take(), reply.done
            await self._send_body(send, data, more=not over)
            reply.sending = False
            if not over:
                await reply.wait()

    async def _send_body(self, send: Send, data: bytes, *, more: bool) -> None:
        for begin in range(0, max(len(data), 1), PIECE):
            rest = more or begin + PIECE < len(data)
            await self._send(
                send, {"type": "http.response.body", "body": data[begin : begin + PIECE], "more_body": rest}
            )

    async def _send(self, send: Send, message: Message) -> None:
        """TimeoutError where the reader takes nothing for long: it holds a place among those who are answered."""
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send(message)

    def _count(self) -> None:
        reply, metrics = self.reply, self.service.metrics
        if reply.unfinished:
            reason = "error" if reply.error is not None else "abort"
            metrics.finished[reason] += reply.unfinished
        if reply.first is not None:
            metrics.ended(
                arrived=reply.arrived,
                queued_s=reply.queued_s,
                first=reply.first,
                end=max(choice.newest or 0.0 for choice in reply.choices),
                prompts=reply.prompt_tokens,
                longest=max(choice.tokens for choice in reply.choices),
                made=reply.tokens,
            )


class Gate:
    """What every request passes first: key, limits and body; and last, the access log."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.keys = [key.encode() for key in service.options.api_key]
        self.max_body = int(service.options.max_body_mb * 1e6)
        self.max_bodies = 64 * self.max_body  # of all requests together
        self.bodies = self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        visit = Visit()
        scope["visit"] = visit

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", visit.id.encode())]
            await send(message)

        post = scope["method"] == "POST"
        self.requests += post
        try:
            self._admit(scope)
            if post:
                receive = replay(await self._body(visit, receive), receive)
            await self.app(scope, receive, send_on)
        except ApiError as error:
            await error_response(error)(scope, receive, send_on)
        except Exception:
            visit.status = 500
            raise
        finally:
            self.requests -= post
            self.bodies -= visit.held
            self._log(scope, visit)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.keys and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            fits = [hmac.compare_digest(given.strip(), key) for key in self.keys]  # all of them, whatever fits
            if scheme.lower() != b"bearer" or not any(fits):
                message = "the API key is wrong or missing; send the header Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] != "POST":
            return
        if self.service.draining:
            raise ApiError(503, "the server is shutting down", headers={"Connection": "close"})
        if self.requests > self.service.options.max_requests:
            raise self.service.overloaded(f"{self.service.options.max_requests} requests are being answered already")
        length = int(headers.get(b"content-length", b"0"))
        if not length and b"transfer-encoding" not in headers:
            return  # no body: the route says what it thinks of that
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(400, "the body must be JSON, with the header Content-Type: application/json")
        if length > self.max_body:
            raise self._too_large()

    async def _body(self, visit: Visit, receive: Receive) -> bytes:
        chunks = []
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its request was complete")
                    chunks.append(message.get("body", b""))
                    visit.held += len(chunks[-1])
                    self.bodies += len(chunks[-1])
                    if visit.held > self.max_body:
                        raise self._too_large()
                    if self.bodies > self.max_bodies:
                        raise self.service.overloaded("the server holds too many large requests")
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408, f"no complete body after {BODY_TIMEOUT_S:g} s", headers={"Connection": "close"}
            ) from None

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.max_body} bytes"
        return ApiError(413, message, headers={"Connection": "close"})

    def _log(self, scope: Scope, visit: Visit) -> None:
        """One line of JSON, without a word of any prompt or answer."""
        now = time.monotonic()
        route = scope.get("route")
        self.service.metrics.http[getattr(route, "path", "other"), str(visit.status)] += 1
        if not access_log.isEnabledFor(logging.INFO):
            return
        client = scope.get("client")
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": visit.id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": visit.status,
            "ms": round(1e3 * (now - visit.start), 1),
        }
        if (reply := visit.reply) is not None:
            line |= {
                "stream": reply.stream,
                "prompt_tokens": reply.prompt_tokens,
                "cached_tokens": sum(reply.cached_tokens),
                "tokens": reply.tokens,
                "queued_ms": round(1e3 * reply.queued_s, 1),
                "first_token_ms": None if reply.first is None else round(1e3 * (reply.first - reply.arrived), 1),
                "finish": [choice.finish_reason for choice in reply.choices],
                "error": reply.error.message if reply.error else None,
            }
        access_log.info(json.dumps(line))


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body already read, and then what else comes: that the client leaves."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return pending.pop() if pending else await receive()

    return read


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


ERRORS = {status: {"model": protocol.ErrorBody} for status in (400, 401, 404, 405, 408, 413, 429, 500, 503)}


def make_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Tachyon",
        description="The OpenAI API over one model.",
        docs_url=None,  # its page would fetch scripts from elsewhere; /openapi.json is the same
        redoc_url=None,
        lifespan=service.running,
        responses=ERRORS,
    )
    app.add_middleware(Gate, service=service)
    if service.options.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.options.cors_origin, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_exception_handler(ApiError, lambda request, error: error_response(error))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(
        Exception, lambda request, error: error_response(ApiError(500, "the server made a mistake; its log has more"))
    )
    _add_generation(app, service)
    _add_information(app, service)
    return app


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is not JSON: {errors[0]['ctx']['error']}"))
    return error_response(protocol.invalid(errors))


async def _http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=headers))


def _add_generation(app: FastAPI, service: Service) -> None:
    stream = {200: {"content": {"text/event-stream": {}, "application/json": {}}}}

    async def answer(request: Request, body: ChatRequest | CompletionRequest) -> Answering:
        visit: Visit = request.scope["visit"]
        loop = asyncio.get_running_loop()
        reply, requests = await loop.run_in_executor(service.workers, service.prepare, body, visit.id, visit.start)
        return Answering(service, visit, reply, requests)

    @app.post("/v1/chat/completions", responses=stream, response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body)

    @app.post("/v1/completions", responses=stream, response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body)


def _add_information(app: FastAPI, service: Service) -> None:
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    model = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "tachyon",
        "max_model_len": service.max_seq_len,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def model_of(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.post("/tokenize")
    def tokenize(
        body: Annotated[protocol.TokenizeRequest | protocol.TokenizeChatRequest, Body()],
    ) -> dict[str, Any]:
        service.check_model(body.model)
        try:
            if isinstance(body, protocol.TokenizeRequest):
                tokens = service.tokenizer.encode(body.prompt, special=body.add_special_tokens)
            else:
                tokens = service.chat_ids(body)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_seq_len}

    @app.post("/detokenize")
    def detokenize(body: protocol.DetokenizeRequest) -> dict[str, str]:
        service.check_model(body.model)
        service.check_tokens(body.tokens, "tokens")
        return {"prompt": service.tokenizer.decode(body.tokens, skip_special=False)}

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.draining:
            raise ApiError(503, "the server is shutting down")
        stats = service.engine.stats()
        if not stats.alive:
            raise ApiError(503, "the engine has stopped; the server's log says why")
        if stats.failures_in_a_row >= MAX_FAILURES and time.monotonic() - stats.failed_at < LOST_S:
            raise ApiError(503, f"the last {stats.failures_in_a_row} steps failed; the server's log says why")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        headers = {
            "Content-Security-Policy": PAGE_POLICY,
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        return HTMLResponse(page, headers=headers)
