"""model.py: every switch of the config against a slow plain formula, every way to feed it, and transformers' logits."""

import cmath
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from checkpoint import load_model, open_checkpoint
from model import ModelConfig, RMSNorm, RopeScaling, Transformer, rope_frequencies
from tests.conftest import MODELS, NEW, ROWS, TINY, new_cache, tiny_model

LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=64)
CONFIGS = {
    "gqa": TINY,
    "mha": replace(TINY, n_kv_heads=6),
    "mqa": replace(TINY, n_kv_heads=1),
    "wide-heads": replace(TINY, head_dim=20),
    "qk-norm": replace(TINY, qk_norm=True, norm_eps=1e-2),
    "biases": replace(TINY, qkv_bias=True, o_bias=True, ffn_bias=True),
    "llama3": replace(TINY, rope_scaling=LLAMA3),
    "linear": replace(TINY, rope_scaling=RopeScaling(kind="linear", factor=4.0), rope_theta=500.0),
    "sliding": replace(TINY, sliding_window=4, sliding_layers=(0, 1)),
    "half-sliding": replace(TINY, sliding_window=4, sliding_layers=(1,)),
    "no-rope": replace(TINY, no_rope_layers=(1,)),
    "tied": replace(TINY, tied_head=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def positions(begin: int, end: int, batch: int = 1) -> Tensor:
    return torch.arange(begin, end).expand(batch, -1)


@torch.no_grad()
def whole(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of one pass over tokens [B, T]."""
    B, T = tokens.shape
    return model(tokens, positions(0, T, B), new_cache(model, batch=B, length=T))


@torch.no_grad()
def decoded(model: Transformer, tokens: Tensor, *, length: int) -> Tensor:
    """The same, token by token over a cache of `length` slots."""
    B, T = tokens.shape
    cache = new_cache(model, batch=B, length=length)
    return torch.cat([model(tokens[:, i : i + 1], positions(i, i + 1, B), cache) for i in range(T)], dim=1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


# ---- Each switch against plain formulas -----------------------------------------------------------------------------


def slow_frequencies(config: ModelConfig) -> list[float]:
    """Llama 3.1's published rule, by wavelengths."""
    freqs = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    s = config.rope_scaling
    if s is None:
        return freqs
    if s.kind == "linear":
        return [f / s.factor for f in freqs]
    scaled = []
    for f in freqs:
        wavelength = 2 * math.pi / f
        if wavelength < s.original_max_seq_len / s.high_freq_factor:
            scaled.append(f)
        elif wavelength > s.original_max_seq_len / s.low_freq_factor:
            scaled.append(f / s.factor)
        else:
            smooth = s.original_max_seq_len / wavelength - s.low_freq_factor
            smooth /= s.high_freq_factor - s.low_freq_factor
            scaled.append((1 - smooth) * f / s.factor + smooth * f)
    return scaled


def slow_logits(model: Transformer, tokens: list[int]) -> Tensor:
    """Logits [T, V] in double precision, one position and one head at a time, without a cache."""
    c = model.config
    w = {name: p.double() for name, p in model.named_parameters(remove_duplicate=False)}
    freqs = slow_frequencies(c)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + c.norm_eps).sqrt() * w[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def rotate(x: Tensor, position: int) -> Tensor:
        turn = torch.tensor([cmath.exp(1j * position * f) for f in freqs], dtype=torch.complex128)
        y = torch.complex(x[: len(freqs)], x[len(freqs) :]) * turn
        return torch.cat([y.real, y.imag])

    xs = [w["embed.weight"][token] for token in tokens]
    for i in range(c.n_layers):
        layer, heads = f"layers.{i}", []
        for position, x in enumerate(xs):
            parts = linear(norm(x, f"{layer}.attention_norm"), f"{layer}.attention.qkv").split(c.head_dim)
            q, k, v = parts[: c.n_heads], parts[c.n_heads : -c.n_kv_heads], parts[-c.n_kv_heads :]
            if c.qk_norm:
                q = [norm(x, f"{layer}.attention.q_norm") for x in q]
                k = [norm(x, f"{layer}.attention.k_norm") for x in k]
            if i not in c.no_rope_layers:
                q, k = [rotate(x, position) for x in q], [rotate(x, position) for x in k]
            heads.append((q, k, v))
        reach = c.sliding_window if i in c.sliding_layers else len(tokens)
        for position in range(len(tokens)):
            seen = heads[max(0, position + 1 - reach) : position + 1]
            outputs = []
            for head in range(c.n_heads):
                group = head // (c.n_heads // c.n_kv_heads)
                scores = torch.stack([heads[position][0][head] @ k[group] for _, k, _ in seen]) / c.head_dim**0.5
                outputs.append(scores.softmax(0) @ torch.stack([v[group] for _, _, v in seen]))
            x = xs[position] + linear(torch.cat(outputs), f"{layer}.attention.o")
            gate, up = linear(norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn.gate_up").chunk(2)
            xs[position] = x + linear(gate * gate.sigmoid() * up, f"{layer}.ffn.down")
    return torch.stack([linear(norm(x, "norm"), "head") for x in xs])


@every_config
def test_logits_are_those_of_the_plain_formulas(config):
    model, tokens = tiny_model(config), tokens_of(1, 14)
    torch.testing.assert_close(
        whole(model, tokens)[0].double(), slow_logits(model, tokens[0].tolist()), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("scaling", [None, LLAMA3, RopeScaling(kind="linear", factor=4.0)])
def test_rotary_frequencies_at_a_real_size(scaling):
    config = replace(TINY, head_dim=128, rope_theta=5e5, rope_scaling=scaling and replace(scaling, factor=32.0))
    expected = torch.tensor(slow_frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(config).double(), expected, rtol=1e-5, atol=0)


def test_rotary_angles_stay_fp32_in_a_bf16_model():
    model = tiny_model(dtype=torch.bfloat16)
    at = torch.tensor([[0, 257, 509]])
    _, step = model.begin(tokens_of(1, 3), at, new_cache(model, batch=1, length=512))
    angle = at[0, :, None].double() * torch.tensor(slow_frequencies(TINY), dtype=torch.float64)
    torch.testing.assert_close(step.cos[0, :, 0].double(), angle.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(step.sin[0, :, 0].double(), angle.sin(), atol=1e-4, rtol=0)


def test_norm_statistics_are_fp32_in_half_precision():
    x = torch.full((1, 48), 1000.0, dtype=torch.float16)  # its square is past fp16's range
    assert torch.equal(RMSNorm(48, 1e-5).half()(x), torch.ones_like(x))


def test_rotary_frequencies_survive_the_meta_device():
    with torch.device("meta"):
        model = Transformer(TINY)
    assert torch.equal(model.rope_freqs, rope_frequencies(TINY))
    assert "rope_freqs" not in model.state_dict()


def test_tied_head_is_the_embedding():
    tied, untied = tiny_model(CONFIGS["tied"]), tiny_model(TINY)
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    x = torch.randn(1, 3, TINY.dim, generator=torch.Generator().manual_seed(0))
    close(tied.logits(x), tied.norm(x) @ tied.embed.weight.T)


# ---- What a token sees ----------------------------------------------------------------------------------------------


def changed(model: Transformer, tokens: Tensor, at: int) -> list[int]:
    """Positions whose logits change with the token at `at`."""
    other = tokens.clone()
    other[0, at] = (tokens[0, at] + 1) % TINY.vocab_size
    difference = (whole(model, tokens) - whole(model, other)).abs().amax(-1)[0]  # [T]
    return (difference > 1e-4).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "sliding"])
def test_a_token_is_seen_by_itself_and_all_after_it(name):
    assert changed(tiny_model(CONFIGS[name]), tokens_of(1, 12), at=5) == list(range(5, 12))


@pytest.mark.parametrize("layers", [1, 2])
def test_each_sliding_layer_sees_a_window_back_and_no_further(layers):
    config = replace(CONFIGS["sliding"], n_layers=layers)
    last = 5 + layers * (config.sliding_window - 1)
    assert changed(tiny_model(config), tokens_of(1, 20), at=5) == list(range(5, last + 1))


def test_decoding_sees_the_same_window():
    model, tokens = tiny_model(CONFIGS["sliding"]), tokens_of(1, 20)
    other = tokens.clone()
    other[0, 5] = (tokens[0, 5] + 1) % TINY.vocab_size
    a, b = decoded(model, tokens, length=24), decoded(model, other, length=24)
    assert torch.equal(a[:, 12:], b[:, 12:])
    assert (a[:, 5:12] - b[:, 5:12]).abs().amax(-1).min() > 1e-4


def test_without_rotary_embedding_the_order_of_what_came_before_is_not_seen():
    tokens = tokens_of(1, 9)
    shuffled = torch.cat([tokens[:, :8].flip(1), tokens[:, 8:]], dim=1)
    without, with_ = (tiny_model(replace(TINY, n_layers=1, no_rope_layers=layers)) for layers in ((0,), ()))
    close(whole(without, tokens)[:, -1], whole(without, shuffled)[:, -1])
    assert (whole(with_, tokens)[:, -1] - whole(with_, shuffled)[:, -1]).abs().max() > 1e-2


# ---- Ways to feed it ------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("length", [13, 16])
def test_prefill_equals_decoding_token_by_token(config, length):
    model, tokens = tiny_model(config), tokens_of(2, 13)
    close(decoded(model, tokens, length=length), whole(model, tokens))


@every_config
@pytest.mark.parametrize("tail", [False, True])
def test_prefill_in_chunks_equals_the_whole(config, tail):
    model, tokens = tiny_model(config), tokens_of(2, 13)
    cache, parts = new_cache(model, batch=2, length=20), []
    for begin, end in ((0, 5), (5, 6), (6, 13)):
        view = cache.narrow(end, tail=True) if tail and end - begin > 1 else cache.narrow(end if tail else 20)
        with torch.no_grad():
            parts.append(model(tokens[:, begin:end], positions(begin, end, 2), view))
    close(torch.cat(parts, dim=1), whole(model, tokens))


@every_config
def test_rows_of_unequal_lengths_equal_each_alone(config):
    model, lengths = tiny_model(config), (3, 11, 7)
    rows = tokens_of(3, 11 + 4)  # a prompt, and four tokens to decode after it
    cache, last = new_cache(model, batch=3, length=16), torch.tensor(lengths)[:, None]
    padded = rows[:, :11].masked_fill(torch.arange(11) >= last, 0)
    with torch.no_grad():
        prefilled = model(padded, positions(0, 11, 3), cache.narrow(11, tail=True))
        steps = [model(rows.gather(1, last + i), last + i, cache) for i in range(4)]
    for row, length in enumerate(lengths):
        alone = whole(model, rows[row : row + 1, : length + 4])[0]
        close(prefilled[row, :length], alone[:length])
        close(torch.cat([step[row] for step in steps]), alone[length:])


def test_forward_changes_nothing_but_the_cache(model):
    tokens = tokens_of(2, 9)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    first = whole(model, tokens)
    whole(model, tokens_of(3, 5, seed=1))
    assert torch.equal(whole(model, tokens), first)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def row_logits(zoo) -> dict[str, list[Tensor]]:
    """transformers' logits on each of ROWS, alone and in one pass."""
    return torch.load(zoo / "row_logits.pt")


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_in_a_batch_give_the_logits_of_transformers(name, zoo, row_logits):
    model = load_model(open_checkpoint(str(zoo / name)), device="cpu", dtype=torch.float32)
    prompts = [row[:-NEW] for row in ROWS]
    longest, lengths = max(map(len, prompts)), torch.tensor([len(p) for p in prompts])
    padded = torch.tensor([p + [0] * (longest - len(p)) for p in prompts])
    cache = new_cache(model, batch=len(ROWS), length=longest + NEW)
    with torch.no_grad():
        prefilled = model(padded, positions(0, longest, len(ROWS)), cache.narrow(longest, tail=True))
        steps = []
        for i in range(NEW):
            next_tokens = torch.tensor([row[len(p) + i] for row, p in zip(ROWS, prompts, strict=True)])
            steps.append(model(next_tokens[:, None], lengths[:, None] + i, cache))
    for row, prompt in enumerate(prompts):
        expected = row_logits[name][row]
        assert (prefilled[row, : len(prompt)] - expected[: len(prompt)]).abs().max() < 1e-4
        assert (torch.cat([step[row] for step in steps]) - expected[len(prompt) :]).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_prefill_and_decode_alone_give_the_logits_of_transformers(name, row, zoo, row_logits):
    model = load_model(open_checkpoint(str(zoo / name)), device="cpu", dtype=torch.float32)
    tokens, T = torch.tensor(ROWS[row : row + 1]), len(ROWS[row])
    cache = new_cache(model, batch=1, length=64)
    with torch.no_grad():
        parts = [model(tokens[:, : T - NEW], positions(0, T - NEW), cache.narrow(T - NEW, tail=True))]
        parts += [model(tokens[:, i : i + 1], positions(i, i + 1), cache.narrow(i + 1)) for i in range(T - NEW, T)]
    assert (torch.cat(parts, dim=1)[0] - row_logits[name][row]).abs().max() < 1e-4
