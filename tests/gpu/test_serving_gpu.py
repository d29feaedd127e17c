"""The serving engine on CUDA: graphs of decode steps and of mixed ones, in any company, with every kind of cache."""

from dataclasses import replace

import pytest
import torch

from cache import KV_DTYPES
from checkpoint import load_model, open_checkpoint
from kernels.decoder import Decoder
from serving.engine import EngineOptions
from serving.runner import Runner, buckets, make_runner
from tests.conftest import TINY, tiny_model
from tests.test_runner import SWITCHES, ask, crowd, crowd_alone, prompt_of, serve

pytestmark = pytest.mark.gpu

SIZES = {"n_blocks": 301, "block_size": 16, "max_running": 40, "max_step_tokens": 256}


def captured_runner(switches: str = "llama", **sizes) -> Runner:
    model = tiny_model(replace(TINY, **SWITCHES[switches]), device="cuda")
    decoder = Decoder(model, max_seq_len=TINY.max_seq_len, batch_size=40)
    runner = Runner(model, decoder=decoder, **(SIZES | sizes))
    for size in buckets(40):
        runner.prepare(size)
    return runner


@pytest.mark.parametrize("sizes", [{}, {"n_blocks": 17}, {"n_blocks": 17, "n_host_blocks": 40}], ids=str)
@pytest.mark.parametrize("switches", SWITCHES)
def test_a_request_gets_in_a_crowd_what_it_gets_alone_on_the_cpu(switches: str, sizes: dict) -> None:
    runner = captured_runner(switches, **sizes)
    expected = crowd_alone(switches)
    for _ in range(3):  # mixed steps run as they are, are captured, and are replayed
        assert serve(runner, *crowd()).tokens == expected
    for request in crowd():  # few at a time: other graphs
        got = serve(runner, request).tokens
        assert got == {key: expected[key] for key in got}
    assert runner.mixed_graphs


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_quantized_cache_serves(kv_dtype: str) -> None:
    runner = captured_runner(kv_dtype=kv_dtype)
    requests = [ask(str(i), prompt_of(3 + 5 * i, i), max_new_tokens=30) for i in range(8)]
    together = serve(runner, *requests).tokens
    alone = {key: tokens for request in requests for key, tokens in serve(runner, request).tokens.items()}
    assert together == alone


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_quantized_weights_serve_batches_of_all_sizes(quantize: str) -> None:
    model = load_model(open_checkpoint("random:smollm2-135m"), device="cuda", dtype=torch.bfloat16, quantize=quantize)
    options = EngineOptions(max_running=80, max_step_tokens=512, kv_cache_gb=0.5)
    runner = make_runner(model, options, compile=True)
    requests = [ask(str(i), prompt_of(10 + i, i), max_new_tokens=20, temperature=0.7) for i in range(80)]
    served = serve(runner, *requests)
    assert all(len(tokens) == 20 for tokens in served.tokens.values())
