"""The runner on CUDA: graphs, steps ahead of their results, swapping, and a cache of what memory is left."""

from dataclasses import replace

import pytest
import torch

from checkpoint import load_model, open_checkpoint
from compiling import compile_model
from model import Transformer
from serving.engine import Engine, EngineOptions
from serving.runner import Runner, make_runner
from tests.conftest import TINY, tiny_model
from tests.test_runner import SWITCHES, Multiples, Served, alone, ask, crowd, prompt_of, serve

pytestmark = pytest.mark.gpu

SIZES = {"n_blocks": 501, "block_size": 16, "max_running": 24, "max_step_tokens": 64}


def new_runner(model: Transformer, *, graphs: bool = True, **sizes) -> Runner:
    sizes = SIZES | sizes
    decoder = compile_model(model, max_seq_len=TINY.max_seq_len, batch_size=sizes["max_running"])
    runner = Runner(model, decoder=decoder, **sizes)
    runner.run_largest()
    if graphs:
        runner.warm_up()
    return runner


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(device="cuda")


@pytest.mark.parametrize(
    "sizes",
    [{}, {"n_blocks": 16}, {"n_blocks": 16, "n_host_blocks": 40}, {"graphs": False}],
    ids=["room", "recompute", "swap", "without graphs"],
)
@pytest.mark.parametrize("switches", SWITCHES)
def test_a_request_gets_in_a_crowd_what_it_gets_alone(switches: str, sizes: dict) -> None:
    model = tiny_model(replace(TINY, **SWITCHES[switches]), device="cuda")
    runner = new_runner(model, **sizes)
    for overlap in (True, False):
        engine = Engine(runner, options=EngineOptions(no_overlap=not overlap))
        served = Served(engine.run(crowd()))
        for request in crowd():
            for index in range(request.n):
                assert served.tokens[request.id, index] == alone(model, request, index), f"{request.id}, {index}"
        stats = engine.stats()
        assert (stats.preemptions > 0) == ("n_blocks" in sizes) and (stats.swaps > 0) == ("n_host_blocks" in sizes)
    assert runner.mixed_graphs


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_quantized_cache_gives_the_generators_tokens(model: Transformer, kv_dtype: str) -> None:
    runner = new_runner(model, kv_dtype=kv_dtype)
    requests = [ask(str(i), prompt_of(3 + i, i), max_new_tokens=12) for i in range(4)]
    served = serve(runner, *requests)
    for request in requests:
        assert served.tokens[request.id, 0] == alone(model, request, kv_dtype=kv_dtype)


def test_few_requests_at_a_time_get_the_same(model: Transformer) -> None:
    runner = new_runner(model)
    for request in crowd():  # other sizes of graphs than a crowd's
        served = serve(runner, request)
        for index in range(request.n):
            assert served.tokens[request.id, index] == alone(model, request, index), f"{request.id}, {index}"
    assert runner.mixed_graphs


def test_only_small_models_draw_in_bursts(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = new_runner(model)
    assert {form.burst for form in runner.graphs if form.size <= 16 and form.kind != "logits"} == {1, 4}
    assert {form.burst for form in runner.graphs if form.size > 16} == {1}
    monkeypatch.setattr("serving.runner.weight_bytes", lambda model: 2.1e9)
    assert new_runner(model, graphs=False).burst == 1


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_quantized_weights_serve_batches_of_all_sizes(quantize: str) -> None:
    model = load_model(open_checkpoint("random:smollm2-135m"), device="cuda", dtype=torch.bfloat16, quantize=quantize)
    runner = make_runner(model, EngineOptions(max_running=80, max_step_tokens=512, kv_cache_gb=0.5), compile=True)
    requests = [ask(str(i), prompt_of(10 + i, i), max_new_tokens=20, temperature=0.7) for i in range(80)]
    served = serve(runner, *requests)
    assert all(len(tokens) == 20 for tokens in served.tokens.values())


def test_what_is_asked_for_beside_tokens(model: Transformer) -> None:
    """As on the CPU, where each is held against a plain reference."""
    wanted = [
        ask("logprobs", prompt_of(6), max_new_tokens=8, logprobs=3),
        ask("bias", prompt_of(6), max_new_tokens=8, logit_bias={7: 100.0}),
        ask("bound", prompt_of(5), max_new_tokens=20, constraint=Multiples),
        ask("plain", prompt_of(9), max_new_tokens=8),
    ]
    on_gpu = serve(new_runner(model), *wanted)
    on_cpu = serve(Runner(tiny_model(), **SIZES), *wanted)
    assert on_gpu.tokens == on_cpu.tokens
    for got, want in zip(on_gpu.logprobs["logprobs", 0], on_cpu.logprobs["logprobs", 0], strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-3) and len(got.top) == 3


def test_the_cache_takes_the_share_of_memory_it_may(model: Transformer) -> None:
    (free, total), reserved = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    share = 1 - (free - 2e9) / total  # two GB of what is free
    options = EngineOptions(gpu_memory_utilization=share, max_running=8, max_step_tokens=256)
    runner = make_runner(model, options, compile=True)
    taken = free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)
    if abs(taken) > 0.3e9:
        pytest.skip("other processes took or freed memory of this GPU meanwhile")
    assert 0.5e9 < runner.cache.nbytes < 2e9
    assert torch.cuda.mem_get_info()[0] > (1 - share) * total - 0.2e9
    request = ask("x", prompt_of(20), max_new_tokens=9)
    assert serve(runner, request).tokens["x", 0] == alone(model, request)
    with pytest.raises(ValueError, match="--gpu-memory-utilization"):
        make_runner(model, EngineOptions(gpu_memory_utilization=0.01), compile=True)


def test_without_compile_the_model_runs_as_it_is(model: Transformer) -> None:
    runner = make_runner(model, EngineOptions(kv_cache_gb=0.01, max_running=4, max_step_tokens=64))
    requests = [ask(str(i), prompt_of(3 + i, i), max_new_tokens=9) for i in range(6)]
    served = serve(runner, *requests)
    for request in requests:
        assert served.tokens[request.id, 0] == alone(model, request)
