"""serving/engine.py: requests from any thread, limits, failures of the device, and an end in good order."""

import argparse
import dataclasses
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
from serving.engine import Engine, EngineOptions, Overloaded, Stopping
from serving.request import Output, Request
from serving.scheduler import Step
from tests.fake_runner import VOCAB, Every, FakeRunner, FakeTicket, reference, request
from tests.test_scheduler import prompt


class Unreliable(FakeRunner):
    """Raises in some steps, when they are launched or when they are waited for, and then holds nothing of use."""

    def __init__(self, *, launches: Iterable[int] = (), waits: Iterable[int] = (), **sizes: int) -> None:
        super().__init__(**sizes)
        self.launches, self.waits = set(launches), set(waits)

    def launch(self, step: Step) -> FakeTicket:
        if self.steps + 1 in self.launches:
            self.steps += 1
            self._forget()
            raise RuntimeError(f"no luck in step {self.steps}")
        ticket = super().launch(step)
        if self.steps in self.waits:
            ticket.wait = self._fail
        return ticket

    def _fail(self) -> None:
        self._forget()
        raise RuntimeError("lost\nand a page of advice")

    def _forget(self) -> None:
        for block in (*self.device, *self.host):
            block[:] = [-1] * self.block_size


def make(runner: FakeRunner | None = None, *, deliver: Callable | None = None, **options) -> Engine:
    return Engine(runner or FakeRunner(n_blocks=101), options=EngineOptions(**options), deliver=deliver)


def gather(outputs: Iterable[Output]) -> dict[tuple[str, int], tuple[list[int], str | None]]:
    found: dict = defaultdict(lambda: ([], None))
    for output in outputs:
        tokens, reason = found[output.request_id, output.index]
        assert reason is None, "an output after the last"
        found[output.request_id, output.index] = [*tokens, *output.token_ids], output.finish_reason
    return dict(found)


def expected(*requests: Request, max_seq_len: int = 401) -> dict:
    return {(one.id, i): reference(one, i, max_seq_len=max_seq_len) for one in requests for i in range(one.n)}


def turns(engine: Engine, count: int) -> list[Output]:
    return list(itertools.chain(*(engine.step() for _ in range(count))))


def finish(engine: Engine) -> list[Output]:
    outputs = []
    while engine.busy:
        outputs += engine.step()
    assert engine.scheduler.pool.used == 0 and not engine._live and not engine._queued and not engine._queued_tokens
    engine.scheduler.check()
    return outputs


REQUESTS = [request(str(i), prompt(3 + 7 * i, i), seed=i, n=1 + i % 2, max_new_tokens=5 + 3 * i) for i in range(6)]


# ---- Turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"no_overlap": True}, {"policy": "mlfq"}, {"no_prefix_caching": True}])
@pytest.mark.parametrize("n_blocks", [101, 11])
def test_offline_all_requests_get_what_they_get_alone(options: dict, n_blocks: int) -> None:
    requests = [dataclasses.replace(one, prompt=one.prompt[:30]) for one in REQUESTS]
    engine = make(FakeRunner(n_blocks=n_blocks, n_host_blocks=5), **options)
    wanted = expected(*requests, max_seq_len=engine.scheduler.max_seq_len)
    assert gather(engine.run(requests)) == wanted
    assert not engine.busy
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage, stats.failed_steps) == (0, 0, 0.0, 0)
    assert stats.prompt_tokens == sum(len(one.prompt) for one in requests)
    assert stats.generated_tokens == sum(len(tokens) for tokens, _ in wanted.values())


class Watched(FakeRunner):
    """Notes when steps are launched and waited for."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.notes: list[str] = []

    def launch(self, step: Step) -> FakeTicket:
        ticket = super().launch(step)
        number, results = self.steps, ticket.results
        self.notes.append(f"launch {number}")
        ticket.wait = lambda: self.notes.append(f"wait {number}") or results
        return ticket


def test_the_next_step_is_launched_before_the_last_is_waited_for() -> None:
    runner = Watched()
    list(make(runner).run([request("x", prompt(5), max_new_tokens=3)]))
    assert runner.notes == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "wait 3"]


@pytest.mark.parametrize("overlaps", [False, True])
def test_without_overlap_each_step_is_waited_for_at_once(overlaps: bool) -> None:
    runner = Watched()
    runner.overlaps = overlaps
    list(make(runner, no_overlap=overlaps).run([request("x", prompt(5), max_new_tokens=3)]))
    assert runner.notes == ["launch 1", "wait 1", "launch 2", "wait 2", "launch 3", "wait 3"]


def test_a_run_that_is_left_early_leaves_nothing() -> None:
    engine = make()
    for _ in engine.run(REQUESTS):
        break
    assert finish(engine) == []
    assert gather(engine.run(REQUESTS)) == expected(*REQUESTS)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_can_be_interrupted_in_the_midst_of_a_step(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(step: Step) -> None:
        raise KeyboardInterrupt

    engine = make(no_overlap=not overlap)
    run = engine.run(REQUESTS)
    for _ in range(12):
        next(run)
    monkeypatch.setattr(engine.runner, "launch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(run)
    monkeypatch.undo()
    assert finish(engine) == []
    assert gather(engine.run(REQUESTS)) == expected(*REQUESTS)


def test_a_request_at_fault_stops_a_run_before_anything_runs() -> None:
    engine = make()
    with pytest.raises(ValueError, match="empty"):
        next(engine.run([*REQUESTS, request("bad", [])]))
    assert engine.runner.steps == 0 and finish(engine) == []


# ---- Requests come and go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [3, VOCAB]}, f"the prompt has the token {VOCAB}; the model knows 0 to {VOCAB - 1}"),
        ({"prompt": [3, -1]}, "the prompt has the token -1"),
        ({"prompt": prompt(401)}, "401 tokens and a sequence holds 401"),
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias has the token {VOCAB}"),
        ({"n": 0}, "n must be at least 1"),
        ({"id": "0"}, "there is a request 0 already"),
    ],
)
def test_a_malformed_request_is_refused_and_leaves_no_trace(fields: dict, text: str) -> None:
    engine = make()
    engine.add(REQUESTS[0])
    with pytest.raises(ValueError, match=text):
        engine.add(dataclasses.replace(REQUESTS[1], **fields))
    assert gather(finish(engine)) == expected(REQUESTS[0])
    engine.add(REQUESTS[0])  # its name is free again
    assert gather(finish(engine)) == expected(REQUESTS[0])


def test_what_is_aborted_says_so_once() -> None:
    engine = make(FakeRunner(n_blocks=101, max_running=2, max_step_tokens=8))
    for one in REQUESTS:
        engine.add(one)
    outputs = turns(engine, 3)
    for one in REQUESTS[1:]:  # running, partly done, waiting
        engine.abort(one.id)
        engine.abort(one.id)
    engine.abort("unknown")
    found = gather(outputs + finish(engine))
    for one in REQUESTS[1:]:
        for index in range(one.n):
            tokens, reason = found[one.id, index]
            assert reason == "abort" and tokens == reference(one, index, max_seq_len=401)[0][: len(tokens)]
    assert found["0", 0] == expected(REQUESTS[0])["0", 0]
    engine.abort("0")  # finished already
    assert finish(engine) == []


def test_one_of_several_samples_can_be_ended() -> None:
    engine = make()
    one = request("x", prompt(5), n=3)
    engine.add(one)
    outputs = turns(engine, 4)
    engine.abort("x", 1)
    found = gather(outputs + finish(engine))
    assert found["x", 1][1] == "abort"
    assert [found["x", i] for i in (0, 2)] == [reference(one, i, max_seq_len=401) for i in (0, 2)]


def test_a_request_aborted_before_its_first_turn_never_runs() -> None:
    engine = make()
    engine.add(REQUESTS[0])
    engine.abort("0")
    assert gather(finish(engine)) == {("0", 0): ([], "abort")}
    assert engine.runner.steps == 0


# ---- Limits ----------------------------------------------------------------------------------------------------------


def test_no_more_requests_wait_than_the_limit() -> None:
    engine = make(FakeRunner(n_blocks=101, max_running=2), max_queued=3)
    for one in REQUESTS[:3]:
        engine.add(one)
    with pytest.raises(Overloaded, match="3 requests are waiting already") as refused:
        engine.add(REQUESTS[3])
    assert refused.value.retry_after >= 1
    assert engine.stats().waiting == 4  # samples
    engine.step()
    engine.add(REQUESTS[3])  # those that run do not wait
    assert gather(finish(engine)) == expected(*REQUESTS[:4])


def test_no_more_tokens_wait_than_the_limit() -> None:
    engine = make(max_queued_tokens=20)
    engine.add(request("large", prompt(50)))  # alone, it may
    with pytest.raises(Overloaded, match="50 tokens are waiting already"):
        engine.add(request("x", prompt(1)))
    engine.abort("large")
    engine.step()
    engine.add(request("x", prompt(20)))
    with pytest.raises(Overloaded):
        engine.add(request("y", prompt(1)))
    finish(engine)


def test_offline_requests_know_no_limits() -> None:
    assert gather(make(max_queued=1, max_queued_tokens=1).run(REQUESTS)) == expected(*REQUESTS)


def age(engine: Engine, seconds: dict[str, float]) -> None:
    """Let requests have been with the engine for so long already."""
    for name, passed in seconds.items():
        engine._live[name].queued -= passed


def test_who_waits_too_long_is_ended_and_who_runs_is_not() -> None:
    engine = make(FakeRunner(n_blocks=101, max_running=1), queue_timeout_s=60)
    engine.add(request("0", prompt(5)))
    engine.step()
    engine.add(request("1", prompt(5)))
    late = dataclasses.replace(request("2", prompt(5)), arrived=time.monotonic() - 70)  # it took long to come
    engine.add(late)
    age(engine, {"0": 100, "1": 61, "2": 10})
    outputs = finish(engine)
    assert [found[1] for found in gather(outputs).values()] == ["abort", "length", "length"]
    (error,) = {output.error for output in outputs if output.error}
    assert error == "the request waited for a place for more than 60 s"


def test_who_takes_too_long_is_ended() -> None:
    engine = make(FakeRunner(n_blocks=101, max_running=1), timeout_s=60)
    engine.add(request("0", prompt(5)))
    outputs = turns(engine, 3)
    engine.add(request("1", prompt(5)))
    engine.add(request("2", prompt(5), max_new_tokens=4))
    age(engine, {"0": 62, "1": 61})
    outputs += finish(engine)
    found = gather(outputs)
    assert [found[name, 0][1] for name in "012"] == ["abort", "abort", "length"]
    assert {o.error for o in outputs} == {None, "the request was not finished within 60 s"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"policy": "lifo"}, "--policy must be one of fcfs, priority, mlfq; got lifo"),
        ({"max_running": 0}, "--max-running must be at least 1; got 0"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization must be above 0 and at most 1; got 1.5"),
        ({"kv_cache_gb": 0.0}, "--kv-cache-gb must be above 0; got 0.0"),
        ({"swap_gb": -1.0}, "--swap-gb must be at least 0; got -1.0"),
        ({"timeout_s": -1.0}, "--timeout-s must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EngineOptions(**changes)


def test_options_are_a_command_line() -> None:
    parser = argparse.ArgumentParser()
    cli.add_options(parser, EngineOptions)
    assert cli.take_options(EngineOptions, parser.parse_args([])) == EngineOptions()
    parsed = parser.parse_args(["--max-running", "3", "--kv-cache-gb", "0.5", "--no-overlap"])
    assert cli.take_options(EngineOptions, parsed) == EngineOptions(max_running=3, kv_cache_gb=0.5, no_overlap=True)


# ---- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "failure"),
    [
        (False, {"launches": [10]}),
        (False, {"waits": [10]}),
        (True, {"launches": [10]}),
        (True, {"waits": [10]}),
        (True, {"launches": [10], "waits": [9]}),
    ],
)
def test_a_failing_step_ends_its_requests_and_the_others_go_on(overlap: bool, failure: dict, caplog) -> None:
    engine = make(Unreliable(n_blocks=101, max_running=2, **failure), no_overlap=not overlap)
    requests = [request(str(i), prompt(6, i), max_new_tokens=12) for i in range(6)]
    with caplog.at_level(logging.CRITICAL):
        outputs = list(engine.run(requests))
    found = gather(outputs)
    failed = [name for (name, _), (_, reason) in found.items() if reason == "error"]
    assert failed == ["0", "1"]
    for one in requests[2:]:
        assert found[one.id, 0] == reference(one, max_seq_len=401)
    (error,) = {output.error for output in outputs if output.error}
    assert error in ("the model failed: RuntimeError: no luck in step 10", "the model failed: RuntimeError: lost")
    stats = engine.stats()
    assert (stats.failed_steps, stats.failures_in_a_row, stats.kv_usage) == (1, 0, 0.0)


def test_a_request_whose_last_step_went_well_is_not_hurt_by_the_next(caplog) -> None:
    engine = make(Unreliable(n_blocks=101, launches=[4]))
    done, hurt = request("done", prompt(6), max_new_tokens=3), request("hurt", prompt(6, 1), max_new_tokens=12)
    with caplog.at_level(logging.CRITICAL):
        found = gather(engine.run([done, hurt]))
    assert found["done", 0] == reference(done, max_seq_len=401)
    assert found["hurt", 0][1] == "error" and len(found["hurt", 0][0]) == 3


def test_a_dead_device_fails_every_request_and_the_engine_stays(caplog) -> None:
    engine = make(Unreliable(n_blocks=101, launches=range(1000)))
    with caplog.at_level(logging.CRITICAL):
        found = gather(engine.run(REQUESTS))
    assert {reason for _, reason in found.values()} == {"error"} and len(found) == 9
    assert engine.stats().failures_in_a_row == engine.runner.steps > 0
    assert not engine.busy


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_failures_hurt_only_who_was_in_flight(data: st.DataObject) -> None:
    logging.disable(logging.CRITICAL)
    failing = st.sets(st.integers(1, 40), max_size=3)
    runner = Unreliable(
        launches=data.draw(failing),
        waits=data.draw(failing),
        n_host_blocks=data.draw(st.sampled_from([0, 8])),
        max_running=data.draw(st.integers(1, 4)),
    )
    policy = data.draw(st.sampled_from(["fcfs", "priority", "mlfq"]))
    engine = make(runner, policy=policy, no_overlap=data.draw(st.booleans()))
    requests = [
        request(
            str(i),
            prompt(data.draw(st.integers(1, 30)), data.draw(st.integers(0, 2))),
            n=data.draw(st.sampled_from([1, 1, 3])),
            max_new_tokens=data.draw(st.integers(1, 15)),
            priority=i % 2,
            constraint=(lambda: Every(6)) if i % 3 == 2 else None,
        )
        for i in range(data.draw(st.integers(1, 8)))
    ]
    outputs = []
    for one in requests:
        engine.add(one)
        outputs += engine.step()
        engine.scheduler.check()
    found = gather(outputs + finish(engine))
    logging.disable(logging.NOTSET)
    for name, wanted in expected(*requests, max_seq_len=41).items():
        tokens, reason = found[name]
        assert (tokens, reason) == wanted or (reason == "error" and tokens == wanted[0][: len(tokens)])


# ---- The thread ------------------------------------------------------------------------------------------------------


class Reader:
    """Gathers what an engine's thread delivers."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.changed = threading.Condition()

    def __call__(self, outputs: list[Output]) -> None:
        with self.changed:
            self.outputs += outputs
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[dict], bool]) -> dict:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(gather(self.outputs)), timeout=20), "nothing came"
            return gather(self.outputs)

    def wait(self, *requests: Request) -> dict:
        """The results of requests, when all have ended."""
        names = [(one.id, index) for one in requests for index in range(one.n)]
        return self.wait_for(lambda found: all(found.get(name, ([], None))[1] for name in names))


@pytest.fixture
def reader() -> Reader:
    return Reader()


class Gated(FakeRunner):
    """Steps whose results come when the test lets them."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.gate = threading.Semaphore(0)

    def launch(self, step: Step) -> FakeTicket:
        ticket = super().launch(step)
        results = ticket.results
        ticket.wait = lambda: self.gate.acquire() and results
        return ticket


@pytest.fixture
def started(reader: Reader) -> Iterator[Callable[..., Engine]]:
    engines = []

    def start(runner: FakeRunner | None = None, **options) -> Engine:
        engine = make(runner, deliver=reader, **options)
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        if isinstance(engine.runner, Gated):
            engine.runner.gate.release(1000)
        engine.stop(drain_s=0)
        assert not engine._thread.is_alive()


def test_requests_may_come_from_many_threads(started: Callable, reader: Reader) -> None:
    engine = started()
    requests = [request(str(i), prompt(3 + i % 20, i), max_new_tokens=8) for i in range(60)]

    def client(own: list[Request]) -> None:
        for one in own:
            engine.add(one)
            if int(one.id) % 4 == 3:
                engine.abort(one.id)

    threads = [threading.Thread(target=client, args=(requests[i::6],)) for i in range(6)]
    for thread in threads:
        thread.start()
    found = reader.wait(*requests)
    for thread in threads:
        thread.join()
    for name, wanted in expected(*requests).items():
        tokens, reason = found[name]
        assert (tokens, reason) == wanted or (reason == "abort" and int(name[0]) % 4 == 3)
        assert tokens == wanted[0][: len(tokens)]


def test_an_idle_engine_makes_no_turns(started: Callable, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: next(count) is None or step(self))
    engine = started()
    engine.add(REQUESTS[0])
    reader.wait(REQUESTS[0])
    before = next(count)
    assert not engine._thread.join(0.1)
    assert next(count) <= before + 2  # the turn that finds nothing left may come after the results


def test_stopping_refuses_new_requests_and_finishes_the_others(started: Callable, reader: Reader) -> None:
    engine = started(Gated(n_blocks=101, max_running=2))
    for one in REQUESTS:
        engine.add(one)
    stopping = threading.Thread(target=engine.stop, kwargs={"drain_s": 60})
    stopping.start()
    while engine._deadline is None:
        time.sleep(0.001)
    with pytest.raises(Stopping, match="the server is stopping"):
        engine.add(request("late", prompt(5)))
    assert issubclass(Stopping, Overloaded)
    engine.runner.gate.release(1000)
    assert reader.wait(*REQUESTS) == expected(*REQUESTS)
    stopping.join(20)
    assert not stopping.is_alive() and not engine._thread.is_alive()
    engine.stop(drain_s=60)  # a second time: nothing to do


def test_who_is_not_finished_in_time_is_ended(started: Callable, reader: Reader) -> None:
    engine = started(Gated(n_blocks=101, max_running=2), no_overlap=True)
    engine.add(request("runs", prompt(5)))
    engine.add(request("waits", prompt(5), n=5))
    engine.runner.gate.release(4)
    reader.wait_for(lambda found: len(found.get(("runs", 0), ([], None))[0]) == 4)
    stopping = threading.Thread(target=engine.stop, kwargs={"drain_s": 0})
    stopping.start()
    while engine._deadline is None:
        time.sleep(0.001)
    engine.runner.gate.release(1000)
    stopping.join(20)
    found = gather(reader.outputs)
    assert {reason for _, reason in found.values()} == {"abort"} and len(found) == 6
    assert {o.error for o in reader.outputs if o.finish_reason} == {"the server is stopping"}
    assert engine.scheduler.pool.used == 0


def test_a_reader_that_raises_does_not_stop_the_others(reader: Reader, caplog) -> None:
    def deliver(outputs: list[Output]) -> None:
        reader(outputs)
        raise KeyError("a client has gone")

    engine = make(deliver=deliver)
    engine.start()
    engine.add(REQUESTS[0])
    with caplog.at_level(logging.CRITICAL):
        assert reader.wait(REQUESTS[0]) == expected(REQUESTS[0])
        engine.stop(drain_s=5)
    assert engine.stats().alive


def test_a_mistake_of_the_engine_itself_is_told_to_everybody(
    started: Callable, reader: Reader, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    engine = started(Gated(n_blocks=101))
    for one in REQUESTS[:3]:
        engine.add(one)
    monkeypatch.setattr(engine.scheduler, "schedule", lambda: 1 // 0)
    with caplog.at_level(logging.CRITICAL):
        engine.runner.gate.release(1000)
        found = reader.wait(*REQUESTS[:3])
    assert {reason for _, reason in found.values()} == {"error"}
    engine._thread.join(20)
    assert not engine.stats().alive
    with pytest.raises(Stopping):
        engine.add(request("late", prompt(5)))


def test_a_thread_needs_a_reader_and_leaves_no_turns_to_others(started: Callable) -> None:
    with pytest.raises(ValueError, match="deliver"):
        make().start()
    engine = started()
    with pytest.raises(ValueError, match="started already"):
        engine.start()
    with pytest.raises(ValueError, match="own thread"):
        next(engine.run(REQUESTS))
    make().stop(drain_s=1)  # never started
