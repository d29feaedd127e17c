"""The process around the API: sockets, signals, and what of a connection the ASGI server leaves unlimited.

SIGTERM and Ctrl-C drain: nothing new is accepted, what runs may finish, and the process ends with exit code 0. A
second signal ends it at once.
"""

import argparse
import asyncio
import contextlib
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import cli
from model import Transformer
from sampling import SamplingParams
from serving.api import OPENAI_SAMPLING, ServerOptions, Service, make_app
from serving.engine import Engine, EngineOptions
from serving.runner import make_runner
from tokenizer import Tokenizer

log = logging.getLogger("tachyon")

HEAD_TIMEOUT_S = 30.0  # from a connection's beginning to the end of its first request's headers
MAX_HEAD = 1 << 16  # bytes of them


class Connection(HttpToolsProtocol):
    """uvicorn's, with limits to a request's headers; and whoever answers may abort the transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # What a slow reader has not taken waits here, where it is seen, and not in the kernel.
        with contextlib.suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1 << 17)
        self._begin_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["transport"] = self.transport
        self._begin_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is not None:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._end_head()
        super().connection_lost(error)

    _deadline: asyncio.TimerHandle | None = None

    def _begin_head(self) -> None:
        self._head = 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    def __init__(self, service: Service) -> None:
        self.service = service
        self.drain_s = service.options.drain_s
        config = uvicorn.Config(
            make_app(service),
            http=Connection,
            ws="none",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,  # ours is written by the application
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(self.drain_s) + 5,
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again when it has drained, which would not be exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        log.info(f"{signal.Signals(number).name}: finishing {self.service.running_requests} requests")
        self.service.draining = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for bound in sockets or ():
            host, port = bound.getsockname()[:2]
            log.info(f"{self.service.name} at http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = asyncio.get_running_loop().call_later(self.drain_s, self.service.end_all, "the server is shutting down")
        await super().shutdown(sockets)
        late.cancel()


def add_options(parser: argparse.ArgumentParser) -> None:
    cli.add_options(parser, ServerOptions)
    cli.add_options(parser, EngineOptions)


def take_options(parsed: argparse.Namespace) -> tuple[EngineOptions, ServerOptions]:
    return cli.take_options(EngineOptions, parsed), cli.take_options(ServerOptions, parsed)


def make_service(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    name: str,
    eos_ids: Sequence[int],
    sampling: SamplingParams = OPENAI_SAMPLING,
    engine_options: EngineOptions,
    options: ServerOptions,
    max_seq_len: int | None = None,
    kv_dtype: str | None = None,
    compile: bool = False,
) -> Service:
    """The API over a loaded model. No sequence is longer than `max_seq_len`, the model's context or the cache."""
    runner = make_runner(model, engine_options, kv_dtype=kv_dtype, compile=compile)
    if max_seq_len is not None and max_seq_len > runner.max_seq_len:
        raise ValueError(f"--max-seq-len {max_seq_len} is more than the {runner.max_seq_len} that model and cache hold")
    return Service(
        lambda deliver: Engine(runner, options=engine_options, deliver=deliver),
        tokenizer,
        name=name,
        eos_ids=eos_ids,
        vocab_size=runner.vocab_size,
        max_seq_len=max_seq_len or runner.max_seq_len,
        options=options,
        sampling=sampling,
    )


def bind(options: ServerOptions) -> socket.socket:
    """A bound socket, so that a port in use is known before a model is loaded; nobody can connect yet."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"--host {options.host}: {error.strerror}; give an address of this machine") from None
    family, kind, proto, _, address = found[0]
    bound = socket.socket(family, kind, proto)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot listen at {options.host}:{options.port}: {error.strerror}; choose another --port"
        ) from None
    return bound


def run(service: Service, bound: socket.socket) -> None:
    """Serve until a signal ends it."""
    host = bound.getsockname()[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is a file
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not host.startswith("127.") and host != "::1" and not service.options.api_key:
        log.warning(f"anyone who reaches {host} can use this server: it listens there and has no --api-key")
    Server(service).run(sockets=[bound])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
