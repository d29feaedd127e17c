"""The paged cache: what the model computes over blocks is what it computes over rows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cache import KV_DTYPES
from model import ModelConfig, Transformer
from paged import PagedBatch, PagedCache
from tests.conftest import TINY, new_cache, tiny_model

BLOCK = 4
SWITCHES = {
    "llama": {},
    "sliding": {"sliding_window": 5, "sliding_layers": (0,)},
    "sliding everywhere": {"sliding_window": 3, "sliding_layers": (0, 1)},
    "qk norm, wide heads": {"qk_norm": True, "head_dim": 16},
    "no rope": {"no_rope_layers": (1,)},
    "biases": {"qkv_bias": True, "o_bias": True, "ffn_bias": True},
    "a key head for each query head": {"n_kv_heads": 6},
    "one key head": {"n_kv_heads": 1},
}


def paged(model: Transformer, n_blocks: int = 40, kv_dtype: str | None = None) -> PagedCache:
    config = model.config
    return PagedCache.allocate(
        n_blocks=n_blocks,
        block_size=BLOCK,
        n_layers=config.n_layers,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        dtype=model.norm.weight.dtype,
        device="cpu",
        kv_dtype=kv_dtype,
    )


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: Transformer, tokens: list[int], cuts: list[int], kv_dtype: str | None = None) -> Tensor:
    """Logits [len(tokens), V] over a cache of its own, run in the same pieces."""
    cache, rows = new_cache(model, batch=1, length=64, kv_dtype=kv_dtype), []
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        view = cache.narrow(end)
        rows.append(model(torch.tensor([tokens[begin:end]]), torch.arange(begin, end)[None], view)[0])
    return torch.cat(rows)


def forward(model: Transformer, cache: PagedCache, tables: Tensor, work: list[tuple[int, list[int], int]]) -> Tensor:
    """Logits of one forward over (row of `tables`, its tokens, position of the first), those with one token first."""
    work = sorted(work, key=lambda one: len(one[1]) > 1)
    decodes = sum(len(tokens) == 1 for _, tokens, _ in work)
    starts = torch.tensor([decodes] + [len(t) for _, t, _ in work[decodes:]]).cumsum(0)
    batch = PagedBatch(
        tables=tables,
        rows=torch.tensor([row for row, _, _ in work], dtype=torch.int32),
        decodes=decodes,
        starts=starts.int(),
        longest=max([0] + [len(t) for _, t, _ in work[decodes:]]),
    )
    tokens = torch.tensor([[token for _, t, _ in work for token in t]])
    at = torch.tensor([[first + i for _, t, first in work for i in range(len(t))]])
    return model(tokens, at, cache.view(batch))[0]


def shuffled_tables(rows: int, blocks: int, n_blocks: int) -> Tensor:
    order = 1 + torch.randperm(n_blocks - 1, generator=torch.Generator().manual_seed(1))[: rows * blocks]
    return torch.cat((order.view(rows, blocks), torch.zeros(1, blocks, dtype=torch.int64))).int()


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_mixed_batches_equal_each_sequence_alone(switches: dict) -> None:
    model = tiny_model(replace(TINY, **switches))
    lengths, first = [1, 3, 4, 5, 9, 13, 8], [0, 2, 4, 1, 5, 12, 7]  # in chunks around the edges of blocks
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    cache, tables = paged(model), shuffled_tables(len(lengths), 4, 40)
    want = [expected(model, p, [cut] * (0 < cut < len(p))) for p, cut in zip(prompts, first, strict=True)]
    chunks = [[(r, p[:cut], 0) for r, (p, cut) in enumerate(zip(prompts, first, strict=True)) if cut]]
    chunks += [[(r, p[cut:], cut) for r, (p, cut) in enumerate(zip(prompts, first, strict=True)) if cut < len(p)]]
    chunks[0].append((len(lengths), [0], 0))  # what pads a batch
    for work in chunks:
        got = forward(model, cache, tables, work)
        at = 0
        for row, tokens, begin in sorted(work, key=lambda one: len(one[1]) > 1):
            if row < len(lengths):
                torch.testing.assert_close(got[at : at + len(tokens)], want[row][begin : begin + len(tokens)])
            at += len(tokens)


@pytest.mark.parametrize("kv_dtype", [None, *KV_DTYPES])
def test_decoding_together_equals_decoding_alone(kv_dtype: str | None) -> None:
    model = tiny_model(replace(TINY, sliding_window=6, sliding_layers=(1,)))
    prompts = [prompt_of(length, length) for length in (1, 4, 7)]
    cache, tables = paged(model, kv_dtype=kv_dtype), shuffled_tables(3, 5, 40)
    forward(model, cache, tables, [(r, p, 0) for r, p in enumerate(prompts)])
    more = prompt_of(9, 5)
    want = [expected(model, p + more, [len(p) + i for i in range(len(more))], kv_dtype) for p in prompts]
    for i, token in enumerate(more):
        got = forward(model, cache, tables, [(r, [token], len(p) + i) for r, p in enumerate(prompts)])
        for r, p in enumerate(prompts):
            torch.testing.assert_close(got[r], want[r][len(p) + i])


def test_blocks_are_shared_by_tables_that_name_them(model: Transformer) -> None:
    prompt, cache = prompt_of(13, 0), paged(model)
    tables = torch.tensor([[5, 9, 2, 7], [5, 9, 2, 8], [0, 0, 0, 0]], dtype=torch.int32)
    forward(model, cache, tables, [(0, prompt, 0)])
    got = forward(model, cache, tables, [(1, prompt[12:], 12)])
    torch.testing.assert_close(got[0], expected(model, prompt, [12])[12])


def test_a_cache_knows_its_bytes() -> None:
    config: ModelConfig = TINY
    model = tiny_model(config)
    slots = 40 * BLOCK * 2 * config.n_layers * config.n_kv_heads
    assert paged(model).nbytes == slots * config.head_dim * 4
    assert paged(model, kv_dtype="int8").nbytes == slots * (config.head_dim + 4)
    cache = paged(model)
    assert (cache.n_blocks, cache.block_size) == (40, BLOCK)
