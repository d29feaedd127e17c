"""The compiled decoder on CUDA: graphs, recompiles, rows of a batch."""

import pytest
import torch

from checkpoint import load_model, open_checkpoint
from generator import Generator, Request
from kernels import attention, elementwise, linear, packed
from sampling import SamplingParams
from tests.conftest import TINY, tiny_model

pytestmark = pytest.mark.gpu


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(generator: Generator, prompts: list[list[int]], new: int, **params) -> list[list[int]]:
    requests = [Request(prompt=p, params=SamplingParams(**params), max_new_tokens=new) for p in prompts]
    for _ in generator.run(requests):
        pass
    return [r.token_ids for r in requests]


def compiled_kernels() -> int:
    import triton

    functions = [f for module in (attention, elementwise, linear, packed) for f in vars(module).values()]
    kernels = {f for f in functions if isinstance(f, triton.JITFunction)}
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.fixture(scope="module")
def eager() -> Generator:
    return Generator(tiny_model(device="cuda"), max_seq_len=512, batch_size=8)


@pytest.fixture(scope="module")
def compiled() -> Generator:
    return Generator(tiny_model(device="cuda"), max_seq_len=512, batch_size=8, compile=True)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 250])
def test_compiled_gives_the_eager_tokens(eager: Generator, compiled: Generator, length: int) -> None:
    assert answers(compiled, [prompt(length)], 40) == answers(eager, [prompt(length)], 40)


def test_sampling_compiled_gives_the_eager_tokens(eager: Generator, compiled: Generator) -> None:
    params = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 3, "presence_penalty": 0.5}
    assert answers(compiled, [prompt(9)], 40, **params) == answers(eager, [prompt(9)], 40, **params)


def test_rows_of_a_batch_get_what_they_get_alone(compiled: Generator) -> None:
    prompts = [prompt(length, seed=length) for length in (3, 90, 17, 2, 61, 8, 33, 5)]
    alone = [answers(compiled, [p], 32)[0] for p in prompts]
    assert answers(compiled, prompts, 32) == alone


def test_bf16_decode_replays_one_graph_and_no_prompt_length_recompiles() -> None:
    generator = Generator(tiny_model(device="cuda", dtype=torch.bfloat16), max_seq_len=256, batch_size=1, compile=True)
    for length in (5, 12, 40):  # two kinds of tile and the large products
        answers(generator, [prompt(length, seed=length)], 8)
    compiled = compiled_kernels()
    for length in (*range(2, 17), *range(20, 210, 10)):
        answers(generator, [prompt(length, seed=length)], 8)
    assert compiled_kernels() == compiled > 0
    assert all(generator.graphs.values()) and len(generator.graphs) == 2  # for one step and for a burst


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_quantized_compiled_gives_the_eager_tokens(quantize: str, rows: int) -> None:
    source = open_checkpoint("random:smollm2-135m")
    model = load_model(source, device="cuda", dtype=torch.float32, quantize=quantize)
    both = [Generator(model, max_seq_len=256, batch_size=3, compile=compile) for compile in (False, True)]
    prompts = [prompt(length) for length in (40, 3, 90)[:rows]]
    assert answers(both[1], prompts, 24) == answers(both[0], prompts, 24)


def test_a_batch_larger_than_the_kernels_for_few_rows_gives_the_eager_tokens() -> None:
    model = tiny_model(device="cuda")
    both = [Generator(model, max_seq_len=128, batch_size=20, compile=compile) for compile in (False, True)]
    prompts = [prompt(3 + length, seed=length) for length in range(20)]
    assert answers(both[1], prompts, 24) == answers(both[0], prompts, 24)


def test_a_graph_serves_new_sampling_values_of_its_kind(eager: Generator, compiled: Generator) -> None:
    for seed in (1, 2):
        params = {"temperature": 0.5 + seed, "seed": seed}
        assert answers(compiled, [prompt(4)], 16, **params) == answers(eager, [prompt(4)], 16, **params)


def test_a_stopped_answer_drops_what_was_decoded_past_it(compiled: Generator) -> None:
    whole = answers(compiled, [prompt(12)], 40)[0]
    request = Request(prompt=prompt(12), max_new_tokens=40, stop_ids=frozenset({whole[10]}))
    for _ in compiled.run([request]):
        pass
    assert request.token_ids == whole[: whole.index(whole[10])]
    assert request.finish_reason == "stop"
    again = answers(compiled, [prompt(12)], 40)[0]  # over the cache that the surplus steps wrote to
    assert again == whole
