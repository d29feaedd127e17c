"""sampling.py: each filter against a slow plain one, and the draws against their distribution."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sampling import (
    History,
    SamplingBatch,
    SamplingParams,
    argmax_in_chunks,
    min_p,
    penalize,
    probs,
    sample,
    top_k_top_p,
    uniform,
    warp,
)

V = 29


def batch_of(*params: SamplingParams, vocab_size: int = V) -> SamplingBatch:
    return SamplingBatch(params, vocab_size=vocab_size, device="cpu")


def logits_of(kind: str, rows: int = 16) -> Tensor:
    x = torch.randn(rows, V, generator=torch.Generator().manual_seed(7)) * 3
    if kind == "tied":
        return x.round()
    if kind == "flat":
        return torch.zeros(rows, V)
    if kind == "extreme":  # masked tokens, and differences past what exp holds
        x = x * 1000
        return x.masked_fill(x < -2000, -math.inf)
    return x


def slow_kept(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that one row keeps: top k, then top p of what that left, then min p. Ties with the last one stay."""
    values = [(x, i) for i, x in enumerate(logits.double().tolist())]
    ranked = sorted(values, key=lambda pair: (-pair[0], pair[1]))
    head = ranked[: top_k or len(ranked)]
    weights = [math.exp(x - head[0][0]) for x, _ in head]
    last, reached = 0, 0.0
    for last, weight in enumerate(weights):  # noqa: B007  the index is what the loop is for
        reached += weight / sum(weights)
        if reached >= top_p and top_p < 1.0:
            break
    lowest = head[last][0]
    if min_p > 0.0:
        lowest = max(lowest, ranked[0][0] + math.log(min_p))
    return {i for x, i in values if x >= lowest and x > -math.inf}


def kept(logits: Tensor) -> list[set[int]]:
    return [{i for i, x in enumerate(row) if x > -math.inf} for row in logits.tolist()]


KINDS = pytest.mark.parametrize("kind", ["random", "tied", "flat", "extreme"])


# ---- Filters --------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("k", [1, 2, 5, V - 1, V, 1000])
def test_top_k_keeps_the_k_largest_and_ties_with_the_last(kind, k):
    logits = logits_of(kind)
    got = top_k_top_p(logits, batch_of(*[SamplingParams(temperature=1.0, top_k=k)] * len(logits)))
    assert kept(got) == [slow_kept(row, top_k=k) for row in logits]
    assert torch.equal(got[got > -math.inf], logits[got > -math.inf])


@KINDS
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_whose_probabilities_reach_p(kind, p):
    logits = logits_of(kind)
    got = top_k_top_p(logits, batch_of(*[SamplingParams(temperature=1.0, top_p=p)] * len(logits)))
    assert kept(got) == [slow_kept(row, top_p=p) for row in logits]


@KINDS
@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_keeps_tokens_near_enough_to_the_likeliest(kind, p):
    logits = logits_of(kind)
    got = min_p(logits, batch_of(*[SamplingParams(temperature=1.0, min_p=p)] * len(logits)))
    assert kept(got) == [slow_kept(row, min_p=p) for row in logits]


def test_top_p_is_of_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    row = SamplingParams(temperature=1.0, top_k=2, top_p=0.5)  # 0.4 / 0.7 reaches one half; 0.4 / 1 would not
    assert kept(top_k_top_p(logits, batch_of(row, vocab_size=4))) == [{0}]
    assert kept(top_k_top_p(logits, batch_of(replace(row, top_k=3), vocab_size=4))) == [{0, 1}]


@KINDS
def test_filters_compose_with_rows_of_their_own_in_one_batch(kind):
    rows = [
        {"top_k": k, "top_p": p, "min_p": m} for k, p, m in [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2)]
    ] + [{"top_k": 7, "top_p": 0.8, "min_p": 0.05}, {"top_k": V, "top_p": 0.3}, {"top_k": 1, "top_p": 0.01}, {}]
    logits = logits_of(kind, rows=len(rows))
    temperatures = [0.5, 1.0, 2.0, 1.3, 0.7, 1.0, 3.0, 1.0]
    params = [SamplingParams(temperature=t, **row) for t, row in zip(temperatures, rows, strict=True)]
    got = warp(logits, batch_of(*params))
    assert kept(got) == [slow_kept(x / t, **row) for x, t, row in zip(logits, temperatures, rows, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-39, 9e-7])
def test_what_is_too_cold_for_a_reciprocal_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9)
    assert params.temperature == 0.0
    assert batch_of(params).greedy


@KINDS
def test_defaults_change_nothing(kind):
    logits = logits_of(kind)
    assert torch.equal(warp(logits, batch_of(*[SamplingParams(temperature=1.0)] * len(logits))), logits)
    assert torch.equal(warp(logits, batch_of(*[SamplingParams()] * len(logits))), logits)


def test_bf16_logits_are_filtered_in_fp32():
    assert (
        warp(logits_of("random").bfloat16(), batch_of(*[SamplingParams(temperature=0.7)] * 16)).dtype == torch.float32
    )


# ---- Penalties ------------------------------------------------------------------------------------------------------


def slow_penalized(logits: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    penalized = []
    for token, x in enumerate(logits.tolist()):
        if token in prompt or token in answer:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.presence_penalty * (token in answer) + params.frequency_penalty * list(answer).count(token)
        penalized.append(x)
    return penalized


def test_penalties_count_prompt_and_answer_as_each_says():
    params = [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(presence_penalty=0.9),
        SamplingParams(frequency_penalty=-0.4),
        SamplingParams(repetition_penalty=0.5, presence_penalty=-0.3, frequency_penalty=1.1),
        SamplingParams(),
    ]
    prompts = [[2, 2, *range(20)], [1, 3], [4], [0, 28], [7]]  # row 0: logits of either sign
    answers = [[2, 8, 8, 8], [3, 3, 9, 28], [4, 4, 4, 4], [0, 6, 6, 7], [7, 7, 1, 2]]
    logits, batch = logits_of("random", rows=len(params)), batch_of(*params)
    for row, prompt in enumerate(prompts):
        batch.see_prompt(row, prompt)
    for step in range(4):
        batch.count(torch.tensor([answer[step] for answer in answers]))
    expected = [slow_penalized(*row) for row in zip(logits, params, prompts, answers, strict=True)]
    torch.testing.assert_close(penalize(logits, batch), torch.tensor(expected))
    assert torch.equal(penalize(logits, batch)[4], logits[4])
    assert batch.history.counts[0, 8] == 3 and batch.history.counts.sum() == 20


def test_penalties_come_before_greedy_and_before_temperature():
    logits = torch.tensor([[3.0, 2.5, -1.0]])
    batch = batch_of(SamplingParams(presence_penalty=1.0), vocab_size=3)
    assert sample(logits, batch, torch.tensor([0])).item() == 0
    batch.count(torch.tensor([0]))
    assert sample(logits, batch, torch.tensor([1])).item() == 1
    hot = batch_of(SamplingParams(presence_penalty=1.0, temperature=2.0), vocab_size=3)
    hot.count(torch.tensor([0]))
    torch.testing.assert_close(warp(logits, hot), torch.tensor([[1.0, 1.25, -0.5]]))


# ---- Distribution and draws -----------------------------------------------------------------------------------------


@KINDS
def test_temperature_zero_takes_the_argmax(kind):
    logits = logits_of(kind)
    batch = batch_of(*[SamplingParams()] * len(logits))
    assert batch.greedy
    assert torch.equal(sample(logits, batch, torch.arange(len(logits))), logits.argmax(-1))
    assert torch.equal(probs(logits, batch), torch.nn.functional.one_hot(logits.argmax(-1), V).float())


@KINDS
def test_a_greedy_row_is_exact_beside_rows_that_sample(kind):
    logits = logits_of(kind)
    params = [SamplingParams(temperature=0.0 if row % 2 else 1.5, top_k=4, seed=row) for row in range(len(logits))]
    batch = batch_of(*params)
    best = logits.argmax(-1)
    assert torch.equal(sample(logits, batch, torch.arange(len(logits)))[1::2], best[1::2])
    assert torch.equal(probs(logits, batch)[1::2], torch.nn.functional.one_hot(best[1::2], V).float())


def test_low_temperature_approaches_one_hot():
    logits = logits_of("random")
    p = probs(logits, batch_of(*[SamplingParams(temperature=1e-3)] * len(logits)))
    torch.testing.assert_close(p, torch.nn.functional.one_hot(logits.argmax(-1), V).float(), atol=1e-3, rtol=0)


@KINDS
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_probs_is_the_softmax_of_what_the_filters_keep(kind, temperature):
    logits = logits_of(kind)
    params = SamplingParams(temperature=temperature, top_k=9, top_p=0.9, min_p=0.02)
    p = probs(logits, batch_of(*[params] * len(logits)))
    torch.testing.assert_close(p.sum(-1), torch.ones(len(logits)))
    for row, got in zip(logits / temperature, p, strict=True):
        keep = slow_kept(row, top_k=9, top_p=0.9, min_p=0.02)
        weights = [math.exp(x - row.max().item()) if i in keep else 0.0 for i, x in enumerate(row.tolist())]
        torch.testing.assert_close(got, torch.tensor([w / sum(weights) for w in weights]), atol=2e-5, rtol=1e-3)


def test_a_row_of_nan_or_a_top_p_that_is_nothing_hurts_no_other_row():
    logits = torch.randn(3, V)
    logits[1] = math.nan
    params = [
        SamplingParams(temperature=1.0, top_p=0.5),
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=1e-46),
    ]
    alone = sample(logits[:1], batch_of(params[0]), torch.tensor([5]))
    drawn = sample(logits, batch_of(*params), torch.tensor([5, 5, 5]))
    assert drawn[0] == alone[0] and 0 <= drawn[1] < V and drawn[2] == logits[2].argmax()


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.7, top_p=0.9),
        SamplingParams(temperature=0.6, top_k=5, min_p=0.05),
    ],
)
def test_draws_follow_probs(params, vary):
    n, logits = 20_000, torch.randn(1, V, generator=torch.Generator().manual_seed(3))
    same, counting = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    rows = [replace(params, seed=i) for i in range(n)] if vary == "seed" else [params] * n
    drawn = sample(logits.expand(n, -1), batch_of(*rows), counting if vary == "position" else same)
    expected = probs(logits, batch_of(params))[0] * n
    counts = torch.bincount(drawn, minlength=V).float()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected).square() / expected)[possible].sum().item()
    freedom = possible.sum().item() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations above the mean


def test_a_row_draws_the_same_alone_and_in_any_batch():
    logits = logits_of("random", rows=6)
    rows = [SamplingParams(temperature=1.0 + row, top_k=row % 3 and 8, seed=row // 2) for row in range(6)]
    rows[4] = SamplingParams()
    position = torch.tensor([5, 5, 9, 1, 2, 70_000])
    together = sample(logits, batch_of(*rows), position)
    alone = [sample(logits[i : i + 1], batch_of(rows[i]), position[i : i + 1]) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(sample(logits[order], batch_of(*[rows[i] for i in order]), position[order]), together[order])


def test_a_row_without_top_p_keeps_all_beside_one_with_it():
    logits = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(1)) * 2
    off = [SamplingParams(temperature=1.0)] * 7
    batch = batch_of(*off, SamplingParams(temperature=1.0, top_p=0.5), vocab_size=50_000)
    assert torch.equal(top_k_top_p(logits, batch)[:7], logits[:7])


def test_seed_and_position_both_decide_the_draw():
    n, flat = 64, torch.zeros(64, 1000)
    seeds = [SamplingParams(temperature=1.0, seed=i) for i in range(n)]
    same = torch.zeros(n, dtype=torch.int64)
    by_seed = sample(flat, batch_of(*seeds, vocab_size=1000), same)
    by_position = sample(flat, batch_of(*seeds[:1] * n, vocab_size=1000), torch.arange(n))
    assert len(by_seed.unique()) > 50 and len(by_position.unique()) > 50
    assert torch.equal(sample(flat, batch_of(*seeds, vocab_size=1000), same), by_seed)


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, -1])
def test_large_and_negative_seeds_are_seeds_of_their_own(seed):
    def noise(seed: int) -> Tensor:
        batch = batch_of(SamplingParams(temperature=1.0, seed=seed))
        return uniform(batch.seed, torch.tensor([[0]]), 100)

    assert torch.equal(noise(seed), noise(seed))
    assert not torch.equal(noise(seed), noise(seed & 0xFFFFFFFF))


# ---- Noise ----------------------------------------------------------------------------------------------------------


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].abs().item()


def test_uniform_is_uniform_and_open():
    seeds, at = torch.arange(64)[:, None], torch.zeros(64, 1, dtype=torch.int64)
    x = uniform(seeds, at, 4096).double()
    n = x.numel()
    assert x.dtype == torch.float64 and x.min() > 0.0 and x.max() < 1.0
    assert abs(x.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(x.var().item() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    counts = torch.histc(x, bins=64, min=0.0, max=1.0)
    assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 4 * math.sqrt(2 * 63)
    assert torch.isfinite(-torch.log(-torch.log(uniform(seeds, at, 4096)))).all()


def test_uniform_does_not_repeat_along_seed_position_or_column():
    n, width = 32, 2048
    counting, zero = torch.arange(n)[:, None], torch.zeros(n, 1, dtype=torch.int64)
    by_seed, by_position = uniform(counting, zero, width), uniform(zero, counting, width)
    bound = 4.5 / math.sqrt((n - 1) * (width - 1))
    for x in (by_seed, by_position):
        assert correlation(x[1:, :], x[:-1, :]) < bound  # the next seed or position
        assert correlation(x[:, 1:], x[:, :-1]) < bound  # the next column
        assert correlation(x[1:, :-1], x[:-1, 1:]) < bound  # along a diagonal
        assert correlation(x[:-1, :-1], x[1:, 1:]) < bound
        assert len(x.unique()) > 0.99 * x.numel()
    assert correlation(by_seed[1:], by_position[1:]) < bound  # seed 3 at position 0 is not seed 0 at position 3
    assert torch.equal(by_seed[0], by_position[0])


def test_neighbours_in_uniform_are_independent():
    n, width, k = 128, 2048, 16
    counting, some = torch.arange(n)[:, None], torch.full((n, 1), 12345)
    for x in (uniform(counting, some, width), uniform(some, counting, width)):
        bins = (x * k).long()
        for a, b in ((bins[:, 1:], bins[:, :-1]), (bins[1:], bins[:-1]), (bins[:, 64:], bins[:, :-64])):
            counts = torch.bincount((a * k + b).flatten(), minlength=k * k).float()
            expected = counts.sum() / k**2
            assert ((counts - expected).square() / expected).sum() < k**2 + 4 * math.sqrt(2 * k**2)
        best = x.unflatten(1, (-1, 64)).argmax(-1)  # the token of equal logits
        counts, expected = torch.bincount(best.flatten(), minlength=64).float(), best.numel() / 64
        assert ((counts - expected).square() / expected).sum() < 63 + 4 * math.sqrt(2 * 63)


def test_uniform_of_a_column_does_not_depend_on_how_many_there_are():
    seed, at = torch.tensor([[5]]), torch.tensor([[11]])
    assert torch.equal(uniform(seed, at, 100_000)[:, :50], uniform(seed, at, 50))


# ---- Batches and parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("temperature", [-1.0, -1e-9, 1e39, math.inf, math.nan], "between 0, which is greedy, and 10000"),
        ("top_k", [-1], "at least 0, where 0 is off"),
        ("top_p", [1.5, 0.0, -0.1, math.nan], "above 0 and at most 1, where 1 is off"),
        ("min_p", [-0.1, 1.1, math.nan], "between 0 and 1, where 0 is off"),
        ("repetition_penalty", [0.0, -1.0, 1e-39, math.inf, math.nan], "between 0.01 and 100, where 1 is off"),
        ("presence_penalty", [1e39, math.nan], "between -10000 and 10000, where 0 is off"),
        ("frequency_penalty", [-math.inf, math.nan], "between -10000 and 10000, where 0 is off"),
    ],
)
def test_parameters_out_of_range_are_refused_with_what_is_allowed(name, values, allowed):
    for value in values:
        with pytest.raises(ValueError) as error:
            SamplingParams(**{name: value})
        assert str(error.value) == f"{name} must be {allowed}; got {value}"


def test_a_batch_takes_over_the_values_of_another_of_its_kind():
    old = batch_of(*[SamplingParams(temperature=1.0, top_k=5, presence_penalty=1.0, seed=1)] * 2)
    new = batch_of(*[SamplingParams(temperature=0.5, top_k=5, presence_penalty=2.0, seed=9)] * 2)
    assert old.kind == new.kind
    new.see_prompt(1, [3, 4])
    new.count(torch.tensor([6, 7]))
    memory = old.temperature.data_ptr()
    old.copy_(new)
    assert old.temperature.data_ptr() == memory
    logits = logits_of("random", rows=2)
    assert torch.equal(probs(logits, old), probs(logits, new))
    assert torch.equal(sample(logits, old, torch.tensor([1, 2])), sample(logits, new, torch.tensor([1, 2])))


def test_kinds_tell_apart_what_runs_different_operations():
    rows = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_k=6),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(presence_penalty=1.0),
    ]
    assert len({batch_of(row).kind for row in rows}) == len(rows)
    assert batch_of(rows[1]).kind == batch_of(replace(rows[1], temperature=2.0, seed=8)).kind


def test_compiled_draws_equal_eager_ones():
    rows = [
        SamplingParams(temperature=0.8, top_k=6, top_p=0.9, seed=1),
        SamplingParams(temperature=1.5, min_p=0.1, presence_penalty=0.5, seed=2),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2),
    ]
    batch = batch_of(*rows)
    for row in range(3):
        batch.see_prompt(row, [row, 5])
    batch.count(torch.tensor([5, 6, 7]))
    compiled = torch.compile(sample, fullgraph=True)
    logits = logits_of("random", rows=3 * 40).view(40, 3, V)
    for i, x in enumerate(logits):
        position = torch.tensor([i, 100 + i, 2 * i])
        assert torch.equal(compiled(x, batch, position), sample(x, batch, position))


@pytest.mark.parametrize("V", [5, 1024, 1025, 5000])
def test_the_argmax_in_chunks_is_the_first_of_the_largest(V: int) -> None:
    x = torch.randn(3, V)
    x[1, 3:] = x[1].max() + 1  # a tie, over chunks as well
    x[2, : V - 1] = -torch.inf
    assert argmax_in_chunks(x).tolist() == [x[0].argmax().item(), 3, V - 1]


def test_a_row_of_a_history_begins_anew_and_rows_are_taken():
    history = History.allocate(3, vocab_size=V, device="cpu")
    history.begin(1, torch.tensor([9, 9]), torch.tensor([4]))
    history.begin(1, torch.tensor([3, 5]), torch.tensor([6, 7, 6]))
    history.begin(2, torch.tensor([8]), torch.tensor([], dtype=torch.int64))
    history.count(torch.tensor([2, 1]), torch.tensor([7, 7]))
    taken = history.take(torch.tensor([2, 1]))
    assert [row.nonzero()[:, 0].tolist() for row in taken.prompt_seen] == [[8], [3, 5]]
    assert [{i: n for i, n in enumerate(row) if n} for row in taken.counts.tolist()] == [{7: 1}, {6: 2, 7: 2}]
    assert not history.prompt_seen[0].any() and not history.counts[0].any()
