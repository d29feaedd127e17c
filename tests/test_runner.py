"""serving/runner.py and drawing.py: what a request gets does not depend on how its steps came about."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache import KV_DTYPES
from generator import Generator
from generator import Request as Prompt
from kernels.decoder import Decoder
from model import Transformer
from sampling import SamplingParams
from serving.engine import Engine, EngineOptions
from serving.request import Output, Request, TokenLogprobs
from serving.runner import MIXED_PROMPTS, MIXED_TOKENS, Runner, buckets, free_memory, make_runner
from serving.scheduler import Step, Work
from tests.conftest import TINY, new_cache, tiny_model

V = TINY.vocab_size
SIZES = {"n_blocks": 501, "block_size": 4, "max_running": 64, "max_step_tokens": 64}
SWITCHES = {
    "llama": {},
    "sliding": {"sliding_window": 5, "sliding_layers": (0,)},
    "qk norm, no rope": {"qk_norm": True, "no_rope_layers": (1,)},
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(name: str, prompt: list[int], **fields) -> Request:
    params = SamplingParams(**{f: fields.pop(f) for f in [*fields] if f in SamplingParams.__dataclass_fields__})
    return Request(id=name, prompt=prompt, params=params, **fields)


class Served:
    """What requests got, by (id, index)."""

    def __init__(self, outputs: Iterable[Output]) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[TokenLogprobs]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        for o in outputs:
            key = o.request_id, o.index
            self.tokens.setdefault(key, []).extend(o.token_ids)
            self.logprobs.setdefault(key, []).extend(o.logprobs or [])
            assert o.finish_reason != "error", o.error
            if o.finish_reason:
                self.reasons[key] = o.finish_reason


def serve(runner: Runner, *requests: Request, **options) -> Served:
    return Served(Engine(runner, options=EngineOptions(**options)).run(requests))


def new_runner(model: Transformer, **sizes) -> Runner:
    return Runner(model, **(SIZES | sizes))


def alone(model: Transformer, request: Request, index: int = 0, kv_dtype: str | None = None) -> list[int]:
    """The tokens that `Generator` makes."""
    params = replace(request.params, seed=request.params.seed + index)
    own = Prompt(prompt=request.prompt, params=params, max_new_tokens=request.max_new_tokens, stop_ids=request.stop_ids)
    for _ in Generator(model, max_seq_len=400, kv_dtype=kv_dtype).run([own]):
        pass
    return own.token_ids


@pytest.fixture(scope="module")
def runner() -> Runner:
    return new_runner(tiny_model())


# ---- Company ---------------------------------------------------------------------------------------------------------

SAMPLED = {"temperature": 1.1, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}


def crowd() -> list[Request]:
    """33 requests: short and long prompts, shared beginnings, greedy, by temperature, by all else, several samples."""
    shared = prompt_of(21, 99)
    requests = []
    for i in range(33):
        prompt = shared[: 9 + i] + prompt_of(i, i) if i % 3 == 0 else prompt_of(1 + 2 * i, i)
        kind = SAMPLED | {"presence_penalty": 0.3} if i % 4 == 1 else {"temperature": 0.9} if i % 4 == 3 else {}
        kind |= {"seed": 7 * i}
        requests.append(ask(str(i), prompt, max_new_tokens=5 + i % 17, n=2 if i % 8 == 5 else 1, **kind))
    return requests


@functools.cache
def crowd_alone(switches: str) -> dict[tuple[str, int], list[int]]:
    model = tiny_model(replace(TINY, **SWITCHES[switches]))
    return {(r.id, index): alone(model, r, index) for r in crowd() for index in range(r.n)}


@pytest.mark.parametrize("overlap", [False, True], ids=["one by one", "overlap"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"max_step_tokens": 1000, "n_blocks": 501}, {"no_prefix_caching": True}),  # whole prompts
        ({"n_blocks": 41}, {"policy": "mlfq"}),  # little memory: preemption by recomputation
        ({"n_blocks": 41, "n_host_blocks": 60}, {}),  # or by swapping
    ],
    ids=["chunks", "no prefixes", "recompute", "swap"],
)
@pytest.mark.parametrize("switches", SWITCHES)
def test_a_request_gets_in_a_crowd_what_it_gets_alone(switches: str, sizes: dict, options: dict, overlap: bool) -> None:
    runner = new_runner(tiny_model(replace(TINY, **SWITCHES[switches])), **sizes)
    runner.overlaps = overlap  # on the CPU that changes nothing but the order of things
    engine = Engine(runner, options=EngineOptions(**options))
    served = Served(engine.run(crowd()))
    assert served.tokens == crowd_alone(switches)
    stats = engine.stats()
    assert (stats.preemptions > 0) == (runner.n_blocks == 41) and (stats.swaps > 0) == ("n_host_blocks" in sizes)
    assert (stats.prefix_hits > 0) == ("no_prefix_caching" not in options)
    assert stats.running == stats.waiting == stats.kv_usage == 0


class Replayed:
    """Stands for a CUDA graph: runs its step again, with the result in the memory of the first time."""

    def __init__(self, run: Callable) -> None:
        self.run, self.result = run, run()

    def replay(self) -> None:
        self.result.copy_(self.run())


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Lets runners capture graphs that are none; the graphs."""
    graphs = []

    def capture(runner: Runner, run: Callable) -> tuple[Replayed, torch.Tensor]:
        graphs.append(Replayed(run))
        return graphs[-1], graphs[-1].result

    monkeypatch.setattr(Runner, "_capture", capture)
    return graphs


@pytest.mark.parametrize("burst", [1, 3])
@pytest.mark.parametrize("sizes", [{}, {"max_step_tokens": 1000}], ids=["chunks", "whole prompts"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_graphs_of_the_kernels_steps_give_the_same(
    switches: str, sizes: dict, burst: int, captured: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(replace(TINY, **SWITCHES[switches]))
    decoder = Decoder(model, max_seq_len=TINY.max_seq_len, batch_size=18)
    runner = new_runner(model, decoder=decoder, max_running=18, n_blocks=61, **sizes)
    runner.captures, runner.burst = True, burst
    monkeypatch.setattr(Decoder, "paged_buckets", lambda decoder, rows, _: (16, 64) if rows <= 4 else ())
    runner.run_largest()
    runner.warm_up()
    used = set()
    for form, (graph, _) in runner.graphs.items():
        monkeypatch.setattr(graph, "replay", lambda form=form, replay=graph.replay: (used.add(form), replay()))
    monkeypatch.setattr(runner, "_steps", lambda form: pytest.fail("ran without its graph"))
    runner.overlaps = True
    expected = crowd_alone(switches)
    assert serve(runner, *crowd()).tokens == expected  # in steps of all sizes, in which some are sampled
    assert len(captured) == len(runner.graphs) + len(runner.mixed_graphs)
    greedy = [r for r in crowd() if r.params.temperature == 0.0]
    plain = [r for r in crowd() if r.params.temperature == 0.9]
    for company in (greedy[:1], greedy[:5], plain[:1], plain[:5], greedy[:12] + plain, greedy):
        served = serve(runner, *company)
        assert served.tokens == {(r.id, i): expected[r.id, i] for r in company for i in range(r.n)}
    assert {form.burst for form in used} == {1, burst}
    assert {form.shown for form in used if form.size <= 4} == {16, 64, runner.max_seq_len}
    assert {form.shown for form in used if form.size > 4} == {runner.max_seq_len}
    assert len(runner.graphs) == len({*runner.graphs}) and not any(f.burst > 1 and f.size > 16 for f in runner.graphs)


def test_attention_is_shown_what_the_longest_sequence_needs(
    captured: list[Replayed], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(replace(TINY, max_seq_len=101))
    decoder = Decoder(model, max_seq_len=101, batch_size=2)
    runner = new_runner(model, decoder=decoder, max_running=2, n_blocks=61, block_size=16)
    runner.captures, runner.burst = True, 3
    monkeypatch.setattr(Decoder, "paged_buckets", lambda decoder, rows, _: (32, 64))
    shown, hidden = [], decoder.hidden

    def spy(tokens: torch.Tensor, pos: torch.Tensor, view) -> torch.Tensor:
        if view.batch.decodes:
            shown.append((int(pos.max()), view.batch.tables.shape[1]))
        return hidden(tokens, pos, view)

    monkeypatch.setattr(decoder, "hidden", spy)
    request = ask("x", prompt_of(9), max_new_tokens=92)
    assert serve(runner, request).tokens["x", 0] == alone(model, request)
    needed = lambda last: next(blocks for blocks in (2, 4, 7) if 16 * blocks > last)  # noqa: E731
    assert all(needed(last) <= blocks <= needed(min(last + 2, 100)) for last, blocks in shown)
    assert {blocks for _, blocks in shown} == {2, 4, 7}


def test_first_requests_find_their_graphs_made(captured: list[Replayed], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    decoder = Decoder(model, max_seq_len=TINY.max_seq_len, batch_size=18)
    runner = new_runner(model, decoder=decoder, max_running=18, n_blocks=61)
    runner.captures = True
    runner.warm_up()
    made = len(captured)
    requests = [ask("short", prompt_of(5)), ask("long", prompt_of(100)), ask("drawn", prompt_of(9), temperature=0.9)]
    for request in requests:
        request.max_new_tokens = 9
        assert serve(runner, request).tokens[request.id, 0] == alone(model, request)
    serve(runner, *requests)
    assert len(captured) == made
    assert set(runner.mixed_graphs) == {(decodes, tokens) for decodes in (0, 8) for tokens in (32, 128)}
    serve(runner, *(ask(str(i), prompt_of(9, i), max_new_tokens=30 - i) for i in range(18)))  # while more than 8 decode
    assert {decodes for decodes, _ in runner.mixed_graphs} == {0, 8, 18}


def test_many_or_long_prompts_are_run_as_they_are(captured: list[Replayed]) -> None:
    model = tiny_model()
    decoder = Decoder(model, max_seq_len=TINY.max_seq_len, batch_size=18)
    runner = new_runner(model, decoder=decoder, max_running=18, n_blocks=61, max_step_tokens=1000)
    runner.captures = True
    expected = crowd_alone("llama")
    assert serve(runner, *crowd()).tokens == expected  # of which the first step has all
    steps = Step(prefills=[Work(None, 0, MIXED_TOKENS[-1] + 1, True, 0)])
    assert runner._mixed_size(steps) is None
    assert runner._mixed_size(Step(prefills=[Work(None, 0, 1, True, 0)] * MIXED_PROMPTS)) is None
    assert runner._mixed_size(Step(prefills=[Work(None, 0, 1, True, 0)] * (MIXED_PROMPTS - 1))) == (0, MIXED_TOKENS[0])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_quantized_cache_gives_the_generators_tokens(kv_dtype: str) -> None:
    model = tiny_model()
    requests = [ask(str(i), prompt_of(3 + i, i), max_new_tokens=12) for i in range(4)]
    served = serve(new_runner(model, kv_dtype=kv_dtype, n_blocks=14, n_host_blocks=9), *requests)
    for request in requests:
        assert served.tokens[request.id, 0] == alone(model, request, kv_dtype=kv_dtype)


def test_a_runner_serves_again_after_a_step_that_failed(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ask("first", prompt_of(5), max_new_tokens=9), ask("second", prompt_of(5), max_new_tokens=9)
    engine = Engine(runner, options=EngineOptions())
    with monkeypatch.context() as patch:
        patch.setattr(runner.decoder, "logits", lambda x: 1 // 0)
        (output,) = engine.run([first])
    assert output.finish_reason == "error"
    assert Served(engine.run([second])).tokens["second", 0] == alone(runner.decoder, second)


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def logits_after(model: Transformer, tokens: list[int]) -> torch.Tensor:
    view = new_cache(model, batch=1, length=64).narrow(len(tokens))
    return model(torch.tensor([tokens]), torch.arange(len(tokens))[None], view)[0, -1]


def test_logprobs_are_those_of_the_model_itself(runner: Runner) -> None:
    requests = [
        ask("none", prompt_of(4), max_new_tokens=6),
        ask("own", prompt_of(6), max_new_tokens=6, logprobs=0),
        ask("three", prompt_of(7), max_new_tokens=6, logprobs=3, temperature=0.7, seed=3, logit_bias={5: 3.0}),
        ask("all", prompt_of(7, 1), max_new_tokens=6, logprobs=500),
    ]
    served = serve(runner, *requests)
    assert served.logprobs["none", 0] == []
    for request in requests[1:]:
        tokens, reported = served.tokens[request.id, 0], served.logprobs[request.id, 0]
        assert [r.token for r in reported] == tokens and len(tokens) == 6
        for i, r in enumerate(reported):
            want = logits_after(runner.decoder, request.prompt + tokens[:i]).log_softmax(-1)
            assert r.logprob == pytest.approx(want[r.token].item(), abs=1e-4)
            best = want.topk(min(request.logprobs, V))
            assert [token for token, _ in r.top] == best.indices.tolist()
            assert [x for _, x in r.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_bias_moves_logits(runner: Runner) -> None:
    prompt = prompt_of(5)
    likely = logits_after(runner.decoder, prompt).topk(2)
    ahead = (likely.values[0] - likely.values[1]).item()
    first, second = likely.indices.tolist()
    served = serve(
        runner,
        ask("as it is", prompt, max_new_tokens=1),
        ask("too little", prompt, max_new_tokens=1, logit_bias={second: ahead - 0.01}),
        ask("enough", prompt, max_new_tokens=1, logit_bias={second: ahead + 0.01, 3: -1.0}),
        ask("banned", prompt, max_new_tokens=8, logit_bias={first: -100.0}),
        ask("always", prompt, max_new_tokens=8, logit_bias={7: 100.0}),
    )
    assert [served.tokens[name, 0] for name in ("as it is", "too little", "enough")] == [[first], [first], [second]]
    assert first not in served.tokens["banned", 0]
    assert served.tokens["always", 0] == [7] * 8


class Multiples:
    """Allows multiples of one number after another, and knows fewer tokens than the model."""

    known = V - 20

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> list[int]:
        return list(range(0, self.known, 2 + len(self.taken) % 3))

    def mask(self) -> np.ndarray:
        bits = np.zeros(-(-self.known // 32) * 32, dtype=bool)
        bits[self.allowed()] = True
        return np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        assert token in self.allowed()
        self.taken.append(token)
        return len(self.taken) < 9


def test_a_constraint_leaves_the_likeliest_allowed_token(runner: Runner) -> None:
    prompt = prompt_of(5)
    served = serve(
        runner,
        ask("free", prompt_of(3), max_new_tokens=20),
        ask("bound", prompt, max_new_tokens=20, constraint=Multiples),
        ask("drawn", prompt, max_new_tokens=20, constraint=Multiples, temperature=5.0),
    )
    assert served.tokens["free", 0] == alone(runner.decoder, ask("free", prompt_of(3), max_new_tokens=20))
    tokens, state = served.tokens["bound", 0], Multiples()
    assert served.reasons["bound", 0] == "stop" and len(tokens) == 9
    for i, token in enumerate(tokens):
        logits = logits_after(runner.decoder, prompt + tokens[:i])
        assert token == max(state.allowed(), key=lambda t: logits[t].item())
        state.accept(token)
    assert len(served.tokens["drawn", 0]) == 9 and served.tokens["drawn", 0] != tokens


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_outlive_preemption(field: str) -> None:
    model = tiny_model()
    requests = [ask(str(i), prompt_of(3 + i, i), max_new_tokens=30, **{field: 1.5}) for i in range(4)]
    requests.append(ask("plain", prompt_of(9, 9), max_new_tokens=30))
    engine = Engine(new_runner(model, n_blocks=20), options=EngineOptions())
    served = Served(engine.run(requests))
    assert engine.stats().preemptions > 0
    for request in requests:
        assert served.tokens[request.id, 0] == alone(model, request)


def test_nothing_of_who_left_stays_in_the_slot() -> None:
    model = tiny_model()
    penalized, drawn = {"presence_penalty": 1.5, "repetition_penalty": 1.5}, {"temperature": 1.3, "seed": 5}
    kinds = [penalized, penalized, drawn, {}, drawn, penalized | drawn]
    requests = [ask(str(i), prompt_of(6, i), max_new_tokens=9, **kind) for i, kind in enumerate(kinds)]
    served = serve(new_runner(model, max_running=1), *requests)
    for request in requests:
        assert served.tokens[request.id, 0] == alone(model, request)


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_every_batch_has_a_bucket_and_the_largest_exactly() -> None:
    for most in (1, 2, 3, 100, 256, 257, 1000):
        sizes = buckets(most)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
        for n in range(1, most + 1):
            size = next(size for size in sizes if size >= n)
            assert size <= max(n + 8, 1.5 * n, n + 32)


def test_a_graph_of_a_larger_size_computes_the_same(model: Transformer) -> None:
    """What pads a batch changes nothing, and is never longer than the others."""
    runner = new_runner(model, max_running=6)
    requests = [ask(str(i), prompt_of(5 + i, i), max_new_tokens=20) for i in range(3)]
    steps = runner._steps
    runner._steps = lambda form: steps(form._replace(size=6))
    served = serve(runner, *requests)
    for request in requests:
        assert served.tokens[request.id, 0] == alone(model, request)
    assert 0 < runner.position[runner.null_row] < 20
    runner.prepare(6)
    assert runner.position[runner.null_row] == 1  # of the last kind


def test_a_runner_takes_the_memory_it_is_given(model: Transformer) -> None:
    options = EngineOptions(kv_cache_gb=0.001, max_running=3, max_step_tokens=32, swap_gb=0.0005)
    runner = make_runner(model, options)
    assert 0.0009e9 < runner.cache.nbytes <= 0.001e9 and runner.block_size == 16
    assert 0.0004e9 < sum(x.nbytes for x in runner.host_blocks) <= 0.0005e9
    assert runner.max_seq_len == min(TINY.max_seq_len, (runner.n_blocks - 1) * 16)
    quantized = make_runner(model, options, kv_dtype="int8")
    assert quantized.n_blocks > 2 * runner.n_blocks
    assert make_runner(model, dataclasses.replace(options, kv_cache_gb=0.00005, block_size=4)).max_seq_len < 200


def test_what_steps_need_and_what_is_not_ours_is_not_the_caches(
    monkeypatch: pytest.MonkeyPatch, model: Transformer
) -> None:
    runner = new_runner(model, max_running=2)
    free = iter([70e9, 70e9 - 3e9 - runner.cache.nbytes])  # a trial leaves 3 GB with torch
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 80e9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert free_memory(torch.device("cuda"), 0.9, lambda: runner) == pytest.approx(70e9 - 3e9 - 8e9)


def test_a_cpus_steps_are_short_and_have_room_for_all_that_run(model: Transformer) -> None:
    sizes = {(0, 4): 512, (0, 600): 600, (32, 4): 32}
    for (most, running), tokens in sizes.items():
        options = EngineOptions(kv_cache_gb=0.001, max_running=running, max_step_tokens=most)
        assert make_runner(model, options).max_step_tokens == tokens


def test_a_cache_without_room_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="--kv-cache-gb") as error:
        make_runner(model, EngineOptions(kv_cache_gb=1e-6))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="int8, fp8"):
        make_runner(model, EngineOptions(), kv_dtype="int3")


@pytest.mark.parametrize("options", [{"kv_cache_gb": 1e6}, {"kv_cache_gb": 0.001, "swap_gb": 1e6}])
def test_a_cache_that_the_machine_has_no_memory_for_is_refused(model: Transformer, options: dict) -> None:
    with pytest.raises(ValueError, match=r"no memory for .* lower --kv-cache-gb.* or --swap-gb") as error:
        make_runner(model, EngineOptions(**options))
    assert "\n" not in str(error.value)
