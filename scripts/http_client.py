"""HTTP as a load generator needs it: one request on one connection, and each event of its answer with its time.

An event costs this process microseconds, because it may share the machine with the server that it measures: no client
library, but asyncio's transports and httptools' parser, which `serve` brings for the server.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools


@dataclass(frozen=True)
class Server:
    url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise ValueError(f"--url {self.url!r} is no address of a server; it looks like http://127.0.0.1:8000")

    @property
    def address(self) -> dict[str, Any]:
        """As asyncio's create_connection takes it."""
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        context = ssl.create_default_context() if secure else None
        return {"host": parts.hostname, "port": parts.port or (443 if secure else 80), "ssl": context}

    def message(self, method: str, path: str, body: bytes = b"") -> bytes:
        parts = urlsplit(self.url)
        lines = [
            f"{method} {parts.path.rstrip('/').removesuffix('/v1')}{path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Connection: close",
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
            *([f"Content-Type: application/json\r\nContent-Length: {len(body)}"] if body else []),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body


class Call(asyncio.Protocol):
    """One request on its connection. `over` is done at its end, whatever that is."""

    def __init__(self, message: bytes, on_event: Callable[[dict, float], bool] | None = None) -> None:
        """`on_event` is given each event's object and its time; we leave when it says True."""
        self.message, self.on_event = message, on_event
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.body = b""  # what of it was no event yet
        self.complete = False
        self.broken: str | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._events = False
        self._now = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.write(self.message)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.end("an answer that is not HTTP")

    def connection_lost(self, error: Exception | None) -> None:
        self.end(None if self.complete else "a lost connection")

    def end(self, broken: str | None = None) -> None:
        if not self.over.done():
            self.broken = broken
            self.over.set_result(None)
        self.transport.abort()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._events = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data
        if not self._events or self.on_event is None:
            return
        *events, self.body = self.body.split(b"\n\n")
        for event in events:
            if self.over.done() or not event.startswith(b"data: ") or event == b"data: [DONE]":
                continue
            if self.on_event(json.loads(event[6:]), self._now):
                self.end()

    def on_message_complete(self) -> None:
        self.complete = True
        self.end()


async def get(server: Server, path: str) -> tuple[int, bytes]:
    """A page; OSError if nobody answers."""
    async with asyncio.timeout(20):
        _, call = await asyncio.get_running_loop().create_connection(
            lambda: Call(server.message("GET", path)), **server.address
        )
        try:
            await call.over
        finally:
            call.end()
    if call.broken:
        raise OSError(f"{server.url}{path}: {call.broken}")
    return call.status, call.body


async def model_of(server: Server) -> dict:
    """The first model that a server has, as it describes it; ValueError if there is no such server."""
    try:
        status, body = await get(server, "/v1/models")
        if status != 200:
            raise ValueError(f"{server.url}/v1/models has the status {status}; give --api-key if it wants one")
        return json.loads(body)["data"][0]
    except (OSError, TimeoutError) as error:
        raise ValueError(f"no server answers at {server.url} ({error or 'too slow'}); start one first") from None
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        raise ValueError(f"{server.url}/v1/models is not what a server of the OpenAI API says") from None
