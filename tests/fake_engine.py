"""An engine without a model, and a real server around it: what the API's tests talk to."""

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from sampling import SamplingParams
from serving.api import OPENAI_SAMPLING, ServerOptions, Service
from serving.engine import EngineStats, Overloaded
from serving.request import Output, Request, TokenLogprobs
from serving.server import Server, bind
from tokenizer import Tokenizer

WAITING = 3  # what it says of its queue


class FakeEngine:
    """The engine's interface: each turn gives every sample the next tokens of what `script` says is its answer."""

    def __init__(
        self, deliver: Callable[[list[Output]], None], script: Callable[[Request, int], Sequence[int]]
    ) -> None:
        self.deliver, self.script = deliver, script
        self.turn_s, self.burst = 0.0, 1  # of a turn: what it takes, and its tokens
        self.held = threading.Event()  # set: turns make nothing
        self.broken: str | None = None  # fails whatever runs, with this message
        self.broken_reason = "error"
        self.max_requests = 10**6
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.live: dict[tuple[str, int], list] = {}  # request, tokens to come, constraint, tokens made
        self.generated = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def add(self, request: Request) -> None:
        with self._lock:
            if 999 in request.prompt:
                raise ValueError("the prompt can never fit")
            if len({id for id, _ in self.live}) >= self.max_requests:
                raise Overloaded("too many requests wait", retry_after=2.5)
            self.requests.append(request)
            for index in range(request.n):
                constraint = request.constraint() if request.constraint else None
                self.live[request.id, index] = [request, iter(self.script(request, index)), constraint, 0]

    def abort(self, request_id: str, index: int | None = None) -> None:
        with self._lock:
            self.aborted.append((request_id, index))
            for key in [k for k in self.live if k[0] == request_id and index in (None, k[1])]:
                del self.live[key]

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, *, drain_s: float) -> None:
        self._stopped.set()
        self._thread.join()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.live),
            waiting=WAITING,
            kv_usage=0.25 if self.live or WAITING else 0.0,
            prefix_hits=2,
            prefix_queries=9,
            preemptions=1,
            prompt_tokens=sum(len(r.prompt) for r in self.requests),
            generated_tokens=self.generated,
        )

    def _run(self) -> None:
        while not self._stopped.is_set():
            time.sleep(self.turn_s or 0.0002)
            if self.held.is_set():
                continue
            with self._lock:
                outputs = [self._turn(key, *state) for key, state in list(self.live.items())]
            if outputs:
                self.deliver(outputs)

    def _turn(self, key: tuple[str, int], request: Request, tokens: Iterator[int], constraint, made: int) -> Output:
        output = Output(*key, token_ids=[], cached_tokens=1, queued_s=0.001)
        if self.broken:
            output.finish_reason, output.error = self.broken_reason, self.broken
        elif constraint is not None:
            token = next(i for i in range(10**6) if constraint.mask()[i // 32] >> np.int32(i % 32) & 1)
            output.token_ids = [] if token in request.stop_ids else [token]
            output.finish_reason = None if output.token_ids and constraint.accept(token) else "stop"
        elif (token := next(tokens, None)) is None:
            output.finish_reason = "stop"
        else:
            output.token_ids = [token, *itertools.islice(tokens, min(self.burst, request.max_new_tokens - made) - 1)]
        made += len(output.token_ids)
        self.generated += len(output.token_ids)
        if output.finish_reason is None and made == request.max_new_tokens:
            output.finish_reason = "length"
        if request.logprobs is not None:
            top = [(token, -0.5 - rank) for token in output.token_ids for rank in range(request.logprobs)]
            output.logprobs = [TokenLogprobs(token, -0.5, top) for token in output.token_ids]
        if output.finish_reason is not None:
            del self.live[key]
        else:
            self.live[key][3] = made
        return output


class Live:
    """A server on a free port of this machine, in a thread."""

    def __init__(self, service: Service) -> None:
        self.service, self.engine = service, service.engine
        self.connections: list[socket.socket] = []
        bound = bind(service.options)
        self.port = bound.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(service)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [bound]}, daemon=True)
        self.thread.start()
        self.wait(lambda: self.server.started)

    def stop(self) -> None:
        if not self.server.should_exit:
            self.server.handle_exit(15, None)
        self.thread.join(20)
        for connection in self.connections:
            connection.close()
        assert not self.thread.is_alive()

    def raw(self, data: bytes, *, size: int | None = None) -> socket.socket:
        """A connection with this already sent; it is closed with the server at the latest."""
        connection = socket.socket()
        self.connections.append(connection)
        if size is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(data)
        return connection

    @staticmethod
    def wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.002)


def request_bytes(body: dict, path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextmanager
def serve(
    tokenizer: Tokenizer,
    script: Callable[[Request, int], Sequence[int]],
    *,
    sampling: SamplingParams = OPENAI_SAMPLING,
    **options,
) -> Iterator[Live]:
    service = Service(
        lambda deliver: FakeEngine(deliver, script),
        tokenizer,
        name="fake",
        eos_ids=tokenizer.eos_ids,
        vocab_size=tokenizer.vocab_size + 7,
        max_seq_len=4096,
        sampling=sampling,
        options=ServerOptions(**{"port": 0, **options}),
    )
    live = Live(service)
    try:
        yield live
    finally:
        live.stop()
