"""serving/scheduler.py and policies.py: what runs when, whose memory goes, and that none of it changes a token."""

import dataclasses
import itertools
from collections import Counter, deque

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sampling import SamplingParams
from serving.policies import Mlfq
from serving.request import Output, Request
from serving.scheduler import Scheduler, Step
from tests.fake_runner import VOCAB, Every, FakeRunner, reference, request


class Machine:
    """A scheduler and a fake runner, turn by turn, with the books checked after each."""

    def __init__(self, *, overlap: bool = False, policy: str | Mlfq = "fcfs", prefix_caching: bool = True, **sizes):
        self.runner = FakeRunner(**sizes)
        names = "n_blocks", "block_size", "max_running", "max_step_tokens", "max_seq_len", "n_host_blocks"
        names += "burst", "burst_rows"
        sizes = {name: getattr(self.runner, name) for name in names}
        self.scheduler = Scheduler(policy=policy, prefix_caching=prefix_caching, **sizes)
        self.overlap = overlap
        self.flying: deque = deque()
        self.outputs: list[Output] = []
        self.steps: list[Step] = []
        self.turns = 0

    def turn(self) -> Step | None:
        scheduler = self.scheduler
        self.turns += 1
        step = scheduler.schedule()
        scheduler.check()
        if step is not None:
            assert {*step.joined} <= {work.sequence for work in step.prefills}, "a slot is given and not used"
            self.flying.append((step, self.runner.launch(step)))
            scheduler.launched(step)
            self.steps.append(step)
        if len(self.flying) > (self.overlap and step is not None):
            done, ticket = self.flying.popleft()
            self.outputs += scheduler.accept(done, *ticket.wait())
        elif step is None and scheduler.requests:
            raise AssertionError("requests are left, and nothing runs")
        scheduler.check()
        return step

    def add(self, *requests: Request) -> None:
        for one in requests:
            self.scheduler.add(one)

    def run(self, *requests: Request) -> None:
        self.add(*requests)
        while self.scheduler.requests or self.flying:
            self.turn()
        assert self.scheduler.pool.used == 0 and self.scheduler.n_waiting == self.scheduler.running == 0

    def found(self, name: str, index: int = 0) -> tuple[list[int], str | None]:
        own = [o for o in self.outputs if (o.request_id, o.index) == (name, index)]
        assert [o.finish_reason for o in own[:-1]] == [None] * (len(own) - 1)
        return list(itertools.chain(*(o.token_ids for o in own))), own[-1].finish_reason if own else None

    def expect(self, *requests: Request) -> None:
        for one in requests:
            for index in range(one.n):
                wanted = reference(one, index, max_seq_len=self.scheduler.max_seq_len)
                assert self.found(one.id, index) == wanted, f"{one.id}, sample {index}"


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 37 + i * i * 11 + i * 5) % VOCAB for i in range(length)]


def shape(step: Step) -> tuple[list[str], list[tuple[str, int, int, bool]]]:
    """Who decodes, and who prefills what."""
    name = lambda work: work.sequence.request.id + (f".{i}" if (i := work.sequence.index) else "")  # noqa: E731
    return [name(w) for w in step.decodes], [(name(w), w.start, w.count, w.samples) for w in step.prefills]


# ---- What a step is made of -----------------------------------------------------------------------------------------


def test_decodes_come_first_and_prompts_are_cut_to_the_budget() -> None:
    machine = Machine(n_blocks=101, max_step_tokens=10, max_running=4)
    machine.add(request("a", prompt(6)), request("b", prompt(17, 1)), request("c", prompt(5, 2)))
    found = [shape(machine.turn()) for _ in range(4)]
    assert found == [
        ([], [("a", 0, 6, True), ("b", 0, 4, False)]),
        (["a"], [("b", 4, 9, False)]),
        (["a"], [("b", 13, 4, True), ("c", 0, 5, True)]),
        (["b", "a", "c"], []),  # the longest first
    ]
    assert machine.runner.largest == 10


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_are_those_of_each_request_alone(overlap: bool) -> None:
    machine = Machine(overlap=overlap, n_blocks=101)
    requests = [request(str(i), prompt(3 + 5 * i, i), seed=i, max_new_tokens=4 + 3 * i) for i in range(8)]
    machine.run(*requests)
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions == 0


@pytest.mark.parametrize("burst", [1, 3])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_id_ends_an_answer_and_is_not_in_it(overlap: bool, burst: int) -> None:
    whole, _ = reference(request("x", prompt(5)), max_seq_len=1000)
    for at in range(8):
        machine = Machine(overlap=overlap, block_size=16, burst=burst)
        one = request("x", prompt(5), stop_ids=frozenset({whole[at]}))
        machine.run(one)
        machine.expect(one)
        assert machine.found("x") == (whole[: whole.index(whole[at])], "stop")


def test_with_overlap_a_step_is_scheduled_before_the_one_before_is_known() -> None:
    machine = Machine(overlap=True)
    machine.add(request("x", prompt(5), max_new_tokens=4))
    for _ in range(4):
        machine.turn()
    assert len(machine.outputs) == 3 and machine.scheduler.n_waiting == 0
    assert machine.turn() is None  # all its tokens were under way: no fifth step
    machine.expect(request("x", prompt(5), max_new_tokens=4))


@pytest.mark.parametrize("overlap", [False, True])
def test_while_nobody_waits_few_sequences_draw_several_tokens_in_a_step(overlap: bool) -> None:
    machine = Machine(overlap=overlap, n_blocks=21, block_size=16, burst=3, burst_rows=2)
    requests = [request(str(i), prompt(5, i), max_new_tokens=30 + 6 * i, seed=i) for i in range(3)]
    turns = {0: requests[0], 3: requests[1], 5: requests[2]}
    for turn in range(8):
        machine.add(*(one for at, one in turns.items() if at == turn))
        machine.turn()
    machine.run()
    machine.expect(*requests)
    steps = [(len(step.decodes), len(step.prefills), step.burst) for step in machine.steps]
    assert steps[:7] == [(0, 1, 1), (1, 0, 3), (1, 0, 3), (1, 1, 1), (2, 0, 3), (2, 1, 1), (3, 0, 1)]
    assert sum(burst == 3 for _, _, burst in steps) > 5
    for work in itertools.chain(*(step.decodes for step in machine.steps if step.burst == 3)):
        assert work.start + 3 < work.sequence.end  # no token too many
    assert any(work.start % 16 > 13 for step in machine.steps if step.burst == 3 for work in step.decodes)
    assert machine.scheduler.counters.generated_tokens == 30 + 36 + 42


def test_who_waits_for_a_place_that_is_taken_holds_up_no_burst() -> None:
    machine = Machine(n_blocks=21, block_size=16, max_running=1, burst=4)
    requests = [request(str(i), prompt(5, i), max_new_tokens=30) for i in range(2)]
    machine.add(*requests)
    for _ in range(4):
        machine.turn()
    assert [step.burst for step in machine.steps] == [1, 4, 4, 4]
    machine.run()
    machine.expect(*requests)


def test_nobody_goes_for_the_later_tokens_of_a_burst() -> None:
    machine = Machine(n_blocks=7, burst=3)
    requests = [request("long", prompt(5), max_new_tokens=12), request("short", prompt(5, 1), max_new_tokens=8)]
    machine.run(*requests)
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions == 0 and any(step.burst > 1 for step in machine.steps)


def test_a_burst_is_only_for_what_a_device_draws_by_itself() -> None:
    wanted = {
        "logprobs": {"logprobs": 0},
        "bias": {"logit_bias": {3: 1.0}},
        "constraint": {"constraint": lambda: Every(30)},
        "penalty": {"params": SamplingParams(presence_penalty=1.0)},
        "top-p": {"params": SamplingParams(temperature=1.0, top_p=0.9)},
        "greedy": {"params": SamplingParams(top_p=0.9)},
        "temperature": {"params": SamplingParams(temperature=0.7, seed=3)},
    }
    for name, fields in wanted.items():
        machine = Machine(n_blocks=21, block_size=16, burst=4)
        machine.run(request(name, prompt(5), max_new_tokens=12, **fields))
        assert any(step.burst > 1 for step in machine.steps) == (name in ("greedy", "temperature")), name


def test_late_results_of_a_finished_sequence_are_dropped() -> None:
    whole, _ = reference(request("x", prompt(5)), max_seq_len=1000)
    machine = Machine(overlap=True, max_running=1, max_step_tokens=32)
    first = request("x", prompt(5), stop_ids=frozenset({whole[2]}))
    second = request("y", prompt(7, 1), max_new_tokens=6)
    machine.run(first, second)  # the second takes over slot and blocks while the first one's last step is under way
    machine.expect(first, second)


def test_a_request_that_can_never_run_is_refused() -> None:
    scheduler = Machine(n_blocks=11, block_size=4, max_seq_len=1000).scheduler
    for fields, text in [
        ({"prompt": []}, "empty"),
        ({"prompt": prompt(41)}, "41 tokens and a sequence holds 41"),
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"logprobs": -1}, "logprobs must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            scheduler.add(request("x", **{"prompt": prompt(5), **fields}))
    scheduler.add(request("x", prompt(5)))
    with pytest.raises(ValueError, match="there is a request x already"):
        scheduler.add(request("x", prompt(5)))
    assert scheduler.n_waiting == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max_running": 0}, "cannot serve 0"),
        ({"max_step_tokens": 7}, "a step of 7 tokens cannot serve 8"),
        ({"n_blocks": 1}, "1 blocks"),
        ({"policy": "lifo"}, "no policy lifo; there are fcfs, priority, mlfq"),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes: dict, text: str) -> None:
    sizes = {"n_blocks": 11, "block_size": 4, "max_running": 8, "max_step_tokens": 8, "max_seq_len": 100}
    with pytest.raises(ValueError, match=text):
        Scheduler(**{**sizes, **changes})


def test_a_prompt_as_large_as_the_pool_gets_its_one_token() -> None:
    machine = Machine(n_blocks=11, block_size=4, max_step_tokens=16)
    requests = [request("small", prompt(9, 1)), request("x", prompt(40)), request("y", prompt(38, 2))]
    machine.run(*requests)
    machine.expect(*requests)
    assert [len(machine.found(name)[0]) for name in ("small", "x", "y")] == [32, 1, 3]


# ---- The prefix cache ------------------------------------------------------------------------------------------------


def test_a_conversation_reuses_its_own_history() -> None:
    machine = Machine(n_blocks=101)
    first = request("1", prompt(9), max_new_tokens=8)
    machine.run(first)
    machine.expect(first)
    history = [*first.prompt, *machine.found("1")[0]]
    second = request("2", [*history, 3, 1], max_new_tokens=5)
    machine.run(second)
    machine.expect(second)
    assert machine.outputs[-1].cached_tokens == 16  # the answer's last token was drawn, and never run
    counters = machine.scheduler.counters
    assert (counters.prefix_queries, counters.prefix_hits, counters.prompt_tokens) == (9 + 19, 16, 9 + 19)


@pytest.mark.parametrize(("changes", "hit"), [({}, 8), ({"salt": "b"}, 0)])
def test_equal_prompts_share_blocks_where_their_salts_are_equal(changes: dict, hit: int) -> None:
    machine = Machine(n_blocks=101, max_step_tokens=12)
    requests = [request("1", prompt(12), salt="a"), request("2", prompt(12), **{"salt": "a", **changes})]
    machine.add(*requests)
    machine.turn()
    machine.turn()  # the first is running; the full blocks of its prompt are published
    assert machine.scheduler.pool.used == 4 + 3 - hit // 4
    machine.run()
    machine.expect(*requests)
    assert machine.outputs[-1].cached_tokens == hit


def test_without_prefix_caching_nothing_is_kept() -> None:
    machine = Machine(n_blocks=101, prefix_caching=False)
    requests = [request(str(i), prompt(12), n=2) for i in range(3)]
    for one in requests:
        machine.run(one)
        assert machine.scheduler.pool.free == 100
    machine.expect(*requests)
    assert machine.outputs[-1].cached_tokens == 0


def test_an_aborted_prefill_leaves_only_what_was_computed() -> None:
    machine = Machine(n_blocks=101, max_step_tokens=10, max_running=4)
    machine.add(request("x", prompt(30)))
    machine.turn()
    machine.scheduler.abort("x")
    machine.scheduler.check()
    assert (machine.scheduler.pool.used, machine.scheduler.pool.cached) == (0, 2)
    again = request("y", prompt(30))
    machine.run(again)
    machine.expect(again)
    assert machine.outputs[-1].cached_tokens == 8


# ---- n > 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("overlap", [False, True])
def test_samples_share_the_prompt_and_run_only_its_last_token_again(length: int, overlap: bool) -> None:
    machine = Machine(n_blocks=101, overlap=overlap)
    one = request("x", prompt(length), n=4, max_new_tokens=9, seed=5)
    machine.run(one)
    machine.expect(one)
    assert machine.runner.prefilled == length + 3
    assert len({tuple(machine.found("x", index)[0]) for index in range(4)}) == 4
    assert machine.scheduler.counters.prompt_tokens == length


def test_samples_share_all_but_the_block_they_write() -> None:
    machine = Machine(n_blocks=101)
    machine.add(request("x", prompt(10), n=3))
    machine.turn()
    step = machine.turn()
    assert shape(step) == (["x"], [("x.1", 9, 1, True), ("x.2", 9, 1, True)])
    assert len(step.copies) == 2 and machine.scheduler.pool.used == 2 + 3


def test_samples_outlive_the_first() -> None:
    machine = Machine(n_blocks=101, max_running=1)
    one = request("x", prompt(10), n=3, max_new_tokens=5)
    machine.run(one)
    machine.expect(one)
    machine = Machine(n_blocks=101, max_step_tokens=8, max_running=2)
    machine.add(one)
    machine.turn()
    assert [o.index for o in machine.scheduler.abort("x", 0)] == [0]  # in the midst of its prefill
    machine.run()
    assert [machine.found("x", index) for index in (1, 2)] == [reference(one, i, max_seq_len=1000) for i in (1, 2)]


# ---- Memory that runs out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_host_blocks", [0, 3, 20])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_newest_is_preempted_and_goes_on_later(overlap: bool, n_host_blocks: int) -> None:
    machine = Machine(n_blocks=11, overlap=overlap, n_host_blocks=n_host_blocks)
    requests = [request(str(i), prompt(10, i), max_new_tokens=20, seed=i) for i in range(3)]
    machine.run(*requests)
    machine.expect(*requests)
    counters = machine.scheduler.counters
    assert counters.preemptions > 0 and (counters.swaps > 0) == (n_host_blocks > 0)
    ends = [output.request_id for output in machine.outputs if output.finish_reason]
    assert ends == ["0", "1", "2"]


def test_what_comes_in_leaves_the_others_room_to_grow() -> None:
    machine = Machine(n_blocks=11)
    requests = [request("0", prompt(20), max_new_tokens=9), request("1", prompt(19, 1), max_new_tokens=3)]
    machine.run(*requests)
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions == 0
    assert not any(len(step.joined) > 1 for step in machine.steps)  # beside the first, 5 blocks would leave none


def test_nobody_goes_for_memory_that_is_about_to_come_back() -> None:
    machine = Machine(n_blocks=6, overlap=True)
    requests = [request("0", prompt(8), max_new_tokens=2), request("1", prompt(7, 1), max_new_tokens=9)]
    machine.run(*requests)
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions == 0


def test_a_prompt_without_room_is_not_looked_up_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(n_blocks=11)
    requests = [request("0", prompt(25), max_new_tokens=12), request("1", prompt(30, 1), max_new_tokens=3)]
    machine.add(*requests)
    looked_up = []
    match = machine.scheduler.pool.match
    monkeypatch.setattr(machine.scheduler.pool, "match", lambda *args: looked_up.append(args) or match(*args))
    machine.run()
    machine.expect(*requests)
    assert len(looked_up) == 3


def test_the_newest_pauses_rather_than_go_for_itself() -> None:
    machine = Machine(n_blocks=8)
    requests = [request(str(i), prompt(length, i), max_new_tokens=4) for i, length in enumerate([9, 4, 8])]
    machine.run(*requests)
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions == 0
    assert [shape(step)[0] for step in machine.steps[1:5]] == [["0", "1"]] * 3 + [["2"]]


def test_nothing_is_swapped_out_for_a_sequence_that_has_been_aborted() -> None:
    machine = Machine(n_host_blocks=2)
    other = request("other", prompt(5, 1))
    machine.add(request("x", prompt(6)))
    machine.turn()
    machine.scheduler._preempt(*machine.scheduler.decoding)
    machine.scheduler.abort("x")
    machine.add(other)
    assert machine.turn().swap_out == []
    machine.run()
    machine.expect(other)


def test_host_blocks_are_not_written_in_the_step_that_reads_them() -> None:
    """One sequence is swapped in while another has to go in the same step: it finds no room on the host."""
    machine = Machine(n_blocks=101, n_host_blocks=2, max_running=2, policy="priority")
    requests = [request(str(p), prompt(6, p), priority=p) for p in (0, 5, 1)]
    machine.add(*requests[:2])
    machine.turn()
    machine.scheduler._preempt(machine.scheduler.requests["0"][0])
    machine.add(requests[2])
    step = machine.turn()
    assert [s.request.id for s in step.joined] == ["0", "1"] and machine.scheduler.counters.preemptions == 2
    assert len(step.swap_in) == 2 and len(step.swap_out) == 2
    machine.run()
    machine.expect(*requests)


# ---- Constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n_host_blocks", [0, 9])
def test_constrained_samples_keep_to_their_grammar(overlap: bool, n_host_blocks: int) -> None:
    machine = Machine(n_blocks=11, overlap=overlap, n_host_blocks=n_host_blocks)
    requests = [
        request("a", prompt(9), n=2, constraint=lambda: Every(7), seed=3),
        request("b", prompt(9, 1), max_new_tokens=14),
        request("c", prompt(9, 2), max_new_tokens=11, constraint=lambda: Every(30)),
        request("d", prompt(9, 2), max_new_tokens=1, constraint=lambda: Every(1)),
    ]
    machine.run(*requests)
    machine.expect(*requests)
    reasons = [machine.found(name)[1] for name in "abcd"]
    assert reasons == ["stop", "length", "length", "stop"]
    assert machine.scheduler.counters.preemptions > 0


class Broken(Every):
    def accept(self, token: int) -> bool:
        if self.taken == 2:
            raise RuntimeError("no such rule")
        return super().accept(token)


def test_a_constraint_that_raises_ends_its_own_sample_only() -> None:
    machine = Machine(n_blocks=101)
    good = request("good", prompt(9), constraint=lambda: Every(7))
    machine.run(request("bad", prompt(9), constraint=lambda: Broken(7)), good)
    machine.expect(good)
    assert machine.found("bad")[1] == "error" and len(machine.found("bad")[0]) == 3
    (error,) = {output.error for output in machine.outputs if output.finish_reason == "error"}
    assert error == "the constraint failed: no such rule"


# ---- Policies --------------------------------------------------------------------------------------------------------


def ends(machine: Machine) -> list[str]:
    return [output.request_id for output in machine.outputs if output.finish_reason]


def test_first_come_first_served() -> None:
    machine = Machine(n_blocks=101, max_running=1)
    machine.run(*(request(str(i), prompt(20 - i, i), max_new_tokens=9 - i, priority=-i) for i in range(4)))
    assert ends(machine) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("n_host_blocks", [0, 20])
@pytest.mark.parametrize("sizes", [{"max_running": 1, "n_blocks": 101}, {"n_blocks": 8}])
def test_a_more_important_request_takes_the_place_of_another(sizes: dict, n_host_blocks: int) -> None:
    machine = Machine(policy="priority", overlap=True, n_host_blocks=n_host_blocks, **sizes)
    requests = [request(str(p), prompt(16, p), max_new_tokens=6, priority=p) for p in (2, 1, 0)]
    for one in requests:
        machine.add(one)
        machine.turn()
        machine.turn()
    machine.run(request("1b", prompt(16, 4), max_new_tokens=6, priority=1))
    machine.expect(*requests)
    assert ends(machine) == ["0", "1", "1b", "2"]


def test_nothing_is_displaced_in_vain() -> None:
    """A prompt that needs all memory waits while somebody as important keeps some of it."""
    machine = Machine(policy="priority", n_blocks=11)
    machine.add(request("keeps", prompt(4), priority=0, max_new_tokens=12))
    machine.add(request("other", prompt(4, 1), priority=5, max_new_tokens=20))
    machine.turn()
    machine.add(request("large", prompt(37, 2), priority=0, max_new_tokens=2))
    while "keeps" not in ends(machine):
        machine.turn()
    assert machine.scheduler.counters.preemptions == 0
    machine.run()
    assert ends(machine) == ["keeps", "large", "other"]


def test_who_is_about_to_finish_is_not_displaced() -> None:
    machine = Machine(policy="priority", overlap=True, max_running=1)
    requests = [request(str(p), prompt(6, p), priority=p, max_new_tokens=2) for p in (1, 0)]
    machine.add(requests[0])
    machine.turn()
    machine.turn()  # the last token is under way
    machine.run(requests[1])
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions == 0


def test_a_long_prompt_is_overtaken_but_goes_on() -> None:
    machine = Machine(policy="priority", n_blocks=101, max_step_tokens=8)
    machine.add(request("long", prompt(40), priority=1))
    machine.turn()
    machine.add(request("x", prompt(5, 1), priority=0), request("y", prompt(9, 2), priority=0), request("z", [1]))
    found = [shape(machine.turn())[1] for _ in range(3)]
    assert found == [
        [("x", 0, 5, True), ("y", 0, 1, False), ("long", 8, 2, False)],
        [("y", 1, 5, False), ("z", 0, 1, True), ("long", 10, 1, False)],
        [("y", 6, 3, True), ("long", 11, 3, False)],
    ]


def test_who_is_displaced_has_no_work_in_that_step() -> None:
    machine = Machine(policy="priority", n_blocks=101, max_step_tokens=8, max_running=2)
    requests = [request(str(p), prompt(length, p), priority=p) for p, length in [(5, 9), (0, 12), (1, 3)]]
    machine.add(requests[0])
    machine.turn()
    machine.add(*requests[1:])
    assert shape(machine.turn())[1] == [("0", 0, 6, False), ("1", 0, 2, False)]  # 5 had one token of it
    machine.run()
    machine.expect(*requests)


def test_who_came_back_stays_until_it_has_a_token() -> None:
    """Two prompts that take longer to compute than either waits patiently: both get on all the same."""
    policy = Mlfq(quantum=1, levels=2, prefill=1, patience=2)
    machine = Machine(policy=policy, n_blocks=101, max_running=1, max_step_tokens=4, prefix_caching=False)
    requests = [request(str(i), prompt(30, i), max_new_tokens=6) for i in range(2)]
    machine.add(*requests)
    while machine.scheduler.requests:
        machine.turn()
        assert machine.turns < 200
    machine.expect(*requests)
    assert machine.scheduler.counters.preemptions > 3


def test_the_source_of_a_copy_is_kept_until_it_is_copied() -> None:
    """The first sample is displaced by a sequence that is swapped in, in the step in which the second is made."""
    machine = Machine(policy=Mlfq(quantum=1000), n_blocks=101, max_running=2, n_host_blocks=20)
    swapped, other, two = request("s", prompt(9, 1)), request("o", prompt(9, 2)), request("x", prompt(6), n=2)
    machine.add(swapped)
    machine.turn()
    machine.add(two)
    machine.turn()
    first, second = machine.scheduler.requests["x"]
    (sequence,) = machine.scheduler.requests["s"]
    first.level, second.level, sequence.level = 2, 0, 1
    machine.scheduler.abort("o")
    machine.scheduler._preempt(sequence)
    step = machine.turn()
    assert {s for s in step.joined} == {second, sequence} and first.slot is None
    assert step.copies and step.swap_in
    machine.run(other)
    machine.expect(swapped, other, two)


def test_short_answers_overtake_long_ones_without_their_lengths_being_known() -> None:
    machine = Machine(policy=Mlfq(quantum=4), n_blocks=101, max_running=2, overlap=True)
    long = [request(f"long{i}", prompt(9, i), max_new_tokens=60) for i in range(2)]
    short = [request(f"short{i}", prompt(9, 10 + i), max_new_tokens=3) for i in range(6)]
    machine.add(*long)
    for one in short:
        for _ in range(5):
            machine.turn()
        machine.add(one)
    machine.run()
    machine.expect(*long, *short)
    assert ends(machine)[:6] == [one.id for one in short]


def test_a_long_prompt_joins_at_the_level_whose_quantum_covers_it() -> None:
    policy = Mlfq(quantum=2, levels=4, prefill=4)
    scheduler = Machine(policy=policy, n_blocks=101).scheduler
    for length, level in [(1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (200, 3)]:
        scheduler.add(request(str(length), prompt(length)))
        assert scheduler.requests[str(length)][0].level == level


def test_a_sequence_sinks_a_level_when_it_has_used_up_a_quantum() -> None:
    machine = Machine(policy=Mlfq(quantum=2, levels=3, prefill=100), n_blocks=101)
    machine.add(request("x", prompt(5), max_new_tokens=20))
    (sequence,) = machine.scheduler.requests["x"]
    levels = [sequence.level for _ in range(12) if machine.turn()]
    assert levels == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    machine = Machine(policy=Mlfq(quantum=4, levels=3, prefill=100), n_blocks=101, block_size=32, burst=4)
    machine.add(request("x", prompt(5), max_new_tokens=20))
    (sequence,) = machine.scheduler.requests["x"]
    assert [sequence.level for _ in range(5) if machine.turn()] == [0, 1, 1, 2, 2]


def test_a_long_answer_is_not_starved_by_short_ones() -> None:
    """Short ones keep coming, more than there is room for: the long one rises again and again."""
    machine = Machine(policy=Mlfq(quantum=2, levels=4, patience=20), n_blocks=101, max_running=1)
    machine.add(request("long", prompt(30), max_new_tokens=30))
    for i in itertools.count():
        if machine.turns % 3 == 0:
            machine.add(request(f"short{i}", prompt(5, i), max_new_tokens=3))
        machine.turn()
        if "long" in ends(machine):
            break
        assert machine.turns < 1500
    assert machine.scheduler.counters.preemptions > 3
    machine.expect(request("long", prompt(30), max_new_tokens=30))


# ---- Failure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_host_blocks", [0, 20])
def test_a_failed_step_ends_who_was_in_it_and_nobody_else(n_host_blocks: int) -> None:
    machine = Machine(n_blocks=11, overlap=True, n_host_blocks=n_host_blocks)
    requests = [request(str(i), prompt(10, i), max_new_tokens=20, n=1 + (i == 1)) for i in range(4)]
    machine.add(*requests)
    while machine.scheduler.counters.preemptions < 2:
        machine.turn()
    in_flight = {s.request.id for s in machine.scheduler.decoding}
    assert machine.scheduler.schedule() is not None  # never launched
    failed = machine.scheduler.fail("boom")
    machine.flying.clear()
    machine.scheduler.check()
    pool = machine.scheduler.pool
    assert (pool.free, pool.cached) == (10, 0)
    assert {o.request_id for o in failed} == in_flight and {o.error for o in failed} == {"boom"}
    machine.runner.device = [[-1] * 4 for _ in range(11)]
    machine.runner.host = [[-1] * 4 for _ in range(n_host_blocks)]
    machine.run()
    machine.expect(*(one for one in requests if one.id not in in_flight))


# ---- Random traffic --------------------------------------------------------------------------------------------------

SIZES = st.fixed_dictionaries(
    {
        "n_blocks": st.sampled_from([2, 5, 11, 11, 11, 40]),
        "block_size": st.sampled_from([1, 2, 4, 16]),
        "max_running": st.integers(1, 5),
        "max_step_tokens": st.integers(5, 20),
        "max_seq_len": st.sampled_from([12, 30, 1000]),
        "n_host_blocks": st.sampled_from([0, 0, 3, 12]),
        "burst": st.sampled_from([1, 2, 3, 5]),
        "burst_rows": st.integers(1, 4),
    }
)
POLICIES = st.sampled_from(["fcfs", "priority", "mlfq", "tiny mlfq"])
SHARED = [prompt(12, 1), prompt(12, 2)]


@st.composite
def arrivals(draw: st.DrawFn, limit: int) -> tuple[int, Request, tuple[int, int | None] | None]:
    """When a request comes, what it is, and when it is aborted, if it is: (turns later, which sample)."""
    length = min(draw(st.one_of(st.integers(1, 12), st.integers(1, 40))), limit)
    shared = draw(st.sampled_from([[], *SHARED]))[: draw(st.integers(0, 12))]
    fields = {
        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "seed": draw(st.integers(0, 2)),
        "max_new_tokens": draw(st.integers(1, 20)),
        "stop_ids": frozenset(draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))),
        "priority": draw(st.integers(0, 2)),
        "salt": draw(st.sampled_from([None, None, "a"])),
    }
    if draw(st.integers(0, 4)) == 0:
        complete = draw(st.integers(1, 12))
        fields["constraint"] = lambda: Every(complete)
    tokens = [*shared, *prompt(length, draw(st.integers(0, 3)))][:length]
    abort = draw(st.none() | st.tuples(st.integers(0, 12), st.sampled_from([None, None, 0, 1])))
    return draw(st.integers(0, 25)), request("", tokens, **fields), abort


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sizes=SIZES, policy=POLICIES, overlap=st.booleans(), prefix_caching=st.booleans())
def test_random_traffic(data: st.DataObject, sizes: dict, policy: str, overlap: bool, prefix_caching: bool) -> None:
    order = Mlfq(quantum=1, levels=3, prefill=4, patience=8) if policy == "tiny mlfq" else policy
    machine = Machine(overlap=overlap, policy=order, prefix_caching=prefix_caching, **sizes)
    limit = machine.scheduler.max_seq_len
    if limit < 2:
        return
    drawn = data.draw(st.lists(arrivals(limit - 1), min_size=1, max_size=12))
    traffic = [(turn, dataclasses.replace(one, id=str(i)), abort) for i, (turn, one, abort) in enumerate(drawn)]
    aborted: dict[tuple[str, int], int] = {}
    tokens = sum((len(one.prompt) + one.max_new_tokens) * one.n for _, one, _ in traffic)
    while machine.turns <= 40 or machine.scheduler.requests or machine.flying:
        for turn, one, abort in traffic:
            if turn == machine.turns:
                machine.add(one)
            if abort is not None and turn + abort[0] == machine.turns:
                ended = machine.scheduler.abort(one.id, abort[1])
                assert {o.finish_reason for o in ended} <= {"abort"}
                aborted.update({(o.request_id, o.index): len(machine.outputs) for o in ended})
                machine.scheduler.check()
        machine.turn()
        assert machine.turns < 60 + 6 * tokens, "somebody starves"
    scheduler = machine.scheduler
    assert scheduler.pool.used == scheduler.n_waiting == scheduler.running == 0
    event(f"preemptions: {min(scheduler.counters.preemptions, 3)}")
    event(f"swaps: {min(scheduler.counters.swaps, 3)}")
    for _, one, _ in traffic:
        for index in range(one.n):
            wanted = reference(one, index, max_seq_len=limit)
            if (one.id, index) not in aborted:
                assert machine.found(one.id, index) == wanted, f"{one.id}, sample {index}"
            else:
                found = machine.found(one.id, index)[0]
                assert found == wanted[0][: len(found)]
    late = Counter((o.request_id, o.index) for o in machine.outputs)
    for name, count in aborted.items():  # nothing after the end
        assert late[name] == sum((o.request_id, o.index) == name for o in machine.outputs[:count])
