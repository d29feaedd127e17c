"""The batching loop: requests from any thread in, outputs of each step out.

One thread, the engine's, owns scheduler and runner; `add` and `abort` leave a note that it reads at the start of its
next turn. A turn schedules and launches a step and then takes the results of the step before, so the device has work
while the host is busy (overlap). What a request does wrong ends that request; what goes wrong in a step ends the
requests that were in it, and the others go on with an empty cache. The engine knows tokens, time and limits; it does
not know text, HTTP or the model: the runner is handed in.
"""

import dataclasses
import gc
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import cli
from sampling import stray_token
from serving.policies import POLICIES
from serving.request import Output, Request, Sequence, TokenLogprobs
from serving.scheduler import Scheduler, Step

log = logging.getLogger("tachyon.serving")


class Ticket(Protocol):
    def wait(self) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The tokens of a step, once it is done, as `Scheduler.accept` takes them."""


class Runner(Protocol):
    """What runs steps, in the order they are launched."""

    n_blocks: int
    block_size: int
    n_host_blocks: int
    max_running: int
    max_step_tokens: int
    max_seq_len: int
    vocab_size: int
    overlaps: bool  # `launch` returns before the step is done; else a step in advance would only delay results
    burst: int  # so many tokens up to `burst_rows` sequences may draw in one step
    burst_rows: int

    def launch(self, step: Step) -> Ticket:
        """Put a step on its way, without waiting for it."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    policy: str = cli.option("fcfs", "who is served first", choices=tuple(POLICIES))
    max_running: int = cli.option(256, "samples that decode together")
    max_step_tokens: int = cli.option(
        0, "tokens in one step; fewer make smoother answers and slower prompts; 0 takes what suits the device"
    )
    block_size: int = cli.option(
        0, "tokens in a block of the cache, a power of two of 16 or more for kernels; 0 takes what suits the device"
    )
    no_prefix_caching: bool = cli.option(False, "do not reuse the keys and values of equal beginnings of prompts")
    kv_cache_gb: float | None = cli.option(
        None, "memory for the cache; without it, what --gpu-memory-utilization leaves, and 1 on the CPU"
    )
    gpu_memory_utilization: float = cli.option(0.9, "share of the GPU's memory to use for all")
    swap_gb: float = cli.option(0.0, "host memory for sequences that have to make room; 0 computes them again")
    no_overlap: bool = cli.option(False, "wait for each step before the next is prepared")
    max_queued: int = cli.option(1024, "requests that may wait; more are refused; 0 sets no limit")
    max_queued_tokens: int = cli.option(0, "tokens of prompts that may wait; more are refused; 0 sets no limit")
    queue_timeout_s: float = cli.option(0.0, "a request that has waited so long is ended; 0 waits on")
    timeout_s: float = cli.option(0.0, "a request that is not finished after so long is ended; 0 sets no limit")

    def __post_init__(self) -> None:
        least = {"max_running": 1, "max_step_tokens": 0, "block_size": 0, "swap_gb": 0, "max_queued": 0}
        least |= {"max_queued_tokens": 0, "queue_timeout_s": 0, "timeout_s": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {value}; got {getattr(self, name)}")
        if self.policy not in POLICIES:
            raise ValueError(f"--policy must be one of {', '.join(POLICIES)}; got {self.policy}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"--gpu-memory-utilization must be above 0 and at most 1; got {self.gpu_memory_utilization}"
            )
        if self.kv_cache_gb is not None and self.kv_cache_gb <= 0:
            raise ValueError(f"--kv-cache-gb must be above 0; got {self.kv_cache_gb}")


class Overloaded(RuntimeError):
    """Too much is waiting; `retry_after` is when to try again, in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(Overloaded):
    """The engine takes no more requests."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int = 0  # samples
    waiting: int = 0  # samples, requests not yet seen by the engine's thread included
    kv_usage: float = 0.0  # share of the blocks that is owned
    prefix_queries: int = 0  # tokens of prompts looked up in the prefix cache
    prefix_hits: int = 0
    preemptions: int = 0
    swaps: int = 0  # preemptions that swapped out
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failed_steps: int = 0
    failures_in_a_row: int = 0
    failed_at: float = 0.0  # when a step failed last, by time.monotonic
    alive: bool = True  # False: the engine's thread has ended by a mistake of its own


class Engine:
    """Runs requests through a runner.

    Either `start` lets a thread do so, which hands outputs to `deliver`; or the caller makes the turns by `step`, or
    all of them by `run`.
    """

    def __init__(
        self, runner: Runner, *, options: EngineOptions, deliver: Callable[[list[Output]], None] | None = None
    ) -> None:
        self.runner, self.options, self.deliver = runner, options, deliver
        self.scheduler = Scheduler(
            n_blocks=runner.n_blocks,
            block_size=runner.block_size,
            max_running=runner.max_running,
            max_step_tokens=runner.max_step_tokens,
            max_seq_len=runner.max_seq_len,
            policy=options.policy,
            prefix_caching=not options.no_prefix_caching,
            n_host_blocks=runner.n_host_blocks,
            burst=runner.burst,
            burst_rows=runner.burst_rows,
        )
        # Guarded by `_changed`, because any thread may call `add`, `abort` and `stop`.
        self._changed = threading.Condition()
        self._new: list[list[Sequence]] = []
        self._ended: list[tuple[str, int | None]] = []
        self._live: OrderedDict[str, Request] = OrderedDict()  # not finished, the oldest first
        self._queued: OrderedDict[str, Request] = OrderedDict()  # of them, no sample has had a step yet
        self._queued_tokens = 0
        self._deadline: float | None = None  # set: no more requests, and those that are left end then
        # The engine's thread's own.
        self._ahead = int(runner.overlaps and not options.no_overlap)  # steps launched before one is waited for
        self._flying: deque[tuple[Step, Ticket]] = deque()  # launched, not accepted
        self._finish_times: deque[float] = deque(maxlen=64)
        self._thread: threading.Thread | None = None
        self._stats = EngineStats()

    # ---- Any thread --------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it can never run, Overloaded if too much is waiting."""
        self._add(request, limited=True)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its samples; whoever is finished or unknown already is no mistake."""
        with self._changed:
            if request_id in self._live:
                self._ended.append((request_id, index))
                self._changed.notify()

    def stats(self) -> EngineStats:
        with self._changed:
            new = sum(map(len, self._new))
        return dataclasses.replace(self._stats, waiting=self._stats.waiting + new) if new else self._stats

    def _add(self, request: Request, *, limited: bool) -> None:
        sequences = self._sequences(request)
        with self._changed:
            if self._deadline is not None or not self._stats.alive:
                raise Stopping("the server is stopping", retry_after=30)
            if request.id in self._live:
                raise ValueError(f"there is a request {request.id} already")
            if limited:
                self._check_limits(request)
            request.queued = time.monotonic()
            self._live[request.id] = self._queued[request.id] = request
            self._queued_tokens += len(request.prompt)
            self._new.append(sequences)
            self._changed.notify()

    def _sequences(self, request: Request) -> list[Sequence]:
        vocab = self.runner.vocab_size
        for name, tokens in (("the prompt", request.prompt), ("logit_bias", request.logit_bias)):
            if (wrong := stray_token(tokens, vocab)) is not None:
                raise ValueError(f"{name} has the token {wrong}; the model knows 0 to {vocab - 1}")
        return self.scheduler.sequences(request)

    def _check_limits(self, request: Request) -> None:
        most, most_tokens = self.options.max_queued, self.options.max_queued_tokens
        if most and len(self._queued) >= most:
            raise Overloaded(f"{len(self._queued)} requests are waiting already", retry_after=self._retry_after())
        # A prompt larger than the limit may wait alone: else it could never run.
        if most_tokens and self._queued and self._queued_tokens + len(request.prompt) > most_tokens:
            raise Overloaded(f"{self._queued_tokens} tokens are waiting already", retry_after=self._retry_after())

    def _retry_after(self) -> float:
        """Until half of the queue has gone, at the rate requests have finished of late."""
        times = self._finish_times
        if len(times) < 2:
            return 1.0
        each = (times[-1] - times[0]) / (len(times) - 1)
        return min(max(each * len(self._queued) / 2, 1.0), 60.0)

    # ---- The loop ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run in a thread of its own from here on."""
        if self.deliver is None:
            raise ValueError("an engine with its own thread needs somebody to deliver outputs to")
        if self._thread is not None:
            raise ValueError("the engine has been started already")
        # What is loaded by now stays: the collector need not look at it in the midst of a step.
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain_s: float) -> None:
        """Refuse new requests, give the others `drain_s` seconds, end what is left, and return when all is still."""
        with self._changed:
            self._deadline = min(time.monotonic() + drain_s, self._deadline or float("inf"))
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(drain_s + 30)  # a device that hangs must not keep the process
            if self._thread.is_alive():
                log.error("the device has not answered for 30 s; leaving it")
            gc.unfreeze()

    def run(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Outputs of requests until all are done. Limits of the queue do not apply; a request at fault stops all."""
        if self._thread is not None:
            raise ValueError("the engine runs in its own thread; use add")
        names = []
        try:
            for request in requests:
                self._add(request, limited=False)
                names.append(request.id)
            while self.busy:
                yield from self.step()
        except KeyboardInterrupt:  # in the midst of a step: it may or may not have been launched
            self._flying.clear()
            self._note_progress(None, self.scheduler.fail("interrupted"))
            raise
        finally:
            for name in names:
                self.abort(name)
            while self.busy:
                self.step()

    @property
    def busy(self) -> bool:
        """Whether a turn has something to do."""
        return bool(self._new or self._ended or self.scheduler.requests or self._flying)

    def _loop(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self.busy and self._deadline is None:
                        self._changed.wait()
                    if not self.busy:
                        return
                self._deliver(self.step())
        except Exception as error:  # a mistake in the engine itself
            log.exception("the engine has stopped")
            self._die(f"the engine has stopped: {error}")

    def _deliver(self, outputs: list[Output]) -> None:
        if not outputs:
            return
        try:
            self.deliver(outputs)
        except Exception:  # a reader's mistake is not the other readers'
            log.exception("outputs could not be delivered")

    def _die(self, error: str) -> None:
        """Tell everybody who still waits; nothing runs after this."""
        with self._changed:
            self._stats = dataclasses.replace(self._stats, running=0, waiting=0, alive=False)
            live, self._live, self._new = self._live, OrderedDict(), []
        left = {name: [s.index for s in samples] for name, samples in self.scheduler.requests.items()}
        self._deliver(
            [
                Output(request.id, index, [], finish_reason="error", error=error)
                for request in live.values()
                for index in left.get(request.id, range(request.n))
            ]
        )

    # ---- A turn, on the engine's thread ------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """One turn: notes from other threads, a step scheduled and launched, the results of the one before."""
        outputs = self._read_notes(time.monotonic())
        step = self.scheduler.schedule()
        assert step is not None or self._flying or not self.scheduler.requests, "requests are left, and nothing runs"
        failures = self._stats.failures_in_a_row
        try:
            if step is not None:
                ticket = self.runner.launch(step)
                self.scheduler.launched(step)
                self._flying.append((step, ticket))
            if self._flying and (step is None or len(self._flying) > self._ahead):
                outputs += self._take()
                failures = 0
        except Exception as error:  # whatever a device may raise
            log.exception("a step failed")
            failures += 1
            outputs += self._fail(error)
        self._note_progress(step, outputs)
        self._count(failures)
        return outputs

    def _take(self) -> list[Output]:
        """Wait for the oldest step under way, and take its results."""
        step, ticket = self._flying[0]
        tokens, logprobs = ticket.wait()
        self._flying.popleft()
        return self.scheduler.accept(step, tokens, logprobs)

    def _fail(self, error: Exception) -> list[Output]:
        """End the requests of the steps under way. If the newest was not launched, the one before may be well."""
        outputs: list[Output] = []
        if len(self.scheduler.in_flight) > len(self._flying):
            try:
                while self._flying:
                    outputs += self._take()
            except Exception:
                log.exception("the step before failed as well")
        self._flying.clear()
        first_line = str(error).partition("\n")[0][:300]
        return outputs + self.scheduler.fail(f"the model failed: {type(error).__name__}: {first_line}")

    def _read_notes(self, now: float) -> list[Output]:
        """Take what other threads have left, and end what is out of time."""
        with self._changed:
            new, self._new = self._new, []
            ended, self._ended = self._ended, []
            late = self._late(now)
        for sequences in new:
            self.scheduler.enqueue(sequences)
        outputs = []
        for request_id, index in ended:
            outputs += self.scheduler.abort(request_id, index)
        for request_id, error in late:
            outputs += self.scheduler.abort(request_id, error=error)
        return outputs

    def _late(self, now: float) -> list[tuple[str, str]]:
        """Requests whose time is up, and which limit it was."""
        if self._deadline is not None and now >= self._deadline:
            return [(name, "the server is stopping") for name in self._live]
        late = []
        limits = [
            (self.options.queue_timeout_s, self._queued, "waited for a place for more than {:g} s"),
            (self.options.timeout_s, self._live, "was not finished within {:g} s"),
        ]
        for limit, requests, text in limits:
            if not limit:
                continue
            for request in requests.values():
                if now - request.queued < limit:
                    break  # the others came later
                late.append((request.id, f"the request {text.format(limit)}"))
        return late

    def _note_progress(self, step: Step | None, outputs: list[Output]) -> None:
        """Keep account of who still waits and who is still live."""
        started = {sequence.request.id for sequence in step.joined} if step is not None and step.joined else ()
        finished = {output.request_id for output in outputs if output.finish_reason is not None}
        if not started and not finished:
            return
        with self._changed:
            for request_id in finished:
                if request_id not in self.scheduler.requests and self._live.pop(request_id, None) is not None:
                    self._finish_times.append(time.monotonic())
            for request_id in (*started, *finished):
                if request_id in started or request_id not in self._live:
                    request = self._queued.pop(request_id, None)
                    self._queued_tokens -= len(request.prompt) if request is not None else 0

    def _count(self, failures: int) -> None:
        scheduler, counters, old = self.scheduler, self.scheduler.counters, self._stats
        self._stats = EngineStats(
            running=scheduler.running,
            waiting=scheduler.n_waiting,
            kv_usage=scheduler.pool.used / scheduler.pool.total,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            swaps=counters.swaps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            failed_steps=old.failed_steps + (failures > old.failures_in_a_row),
            failures_in_a_row=failures,
            failed_at=time.monotonic() if failures > old.failures_in_a_row else old.failed_at,
        )
