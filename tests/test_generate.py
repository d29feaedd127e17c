"""generate.py: what the Generator decodes, the text of an answer, figures, prompts and options."""

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import hardware
from cache import KV_DTYPES
from generate import Options, read_prompts
from generator import Answer, Generator, Request
from meter import Meter, describe
from sampling import SamplingParams
from tests.conftest import TINY, tiny_model
from tokenizer import Tokenizer, load_tokenizer

SAMPLED = {"temperature": 0.9, "min_p": 0.02, "seed": 3}


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(generator: Generator, *requests: Request) -> list[list[int]]:
    for _ in generator.run(requests):
        pass
    return [request.token_ids for request in requests]


def answers(generator: Generator, prompts: Sequence[list[int]], new: int = 24, **params) -> list[list[int]]:
    return run(generator, *(Request(prompt=p, params=SamplingParams(**params), max_new_tokens=new) for p in prompts))


def fresh(p: list[int], new: int = 24, *, max_seq_len: int = 256, kv_dtype: str | None = None, **params) -> list[int]:
    """What a prompt gives alone, on a generator that has seen nothing else."""
    return answers(Generator(tiny_model(), max_seq_len=max_seq_len, kv_dtype=kv_dtype), [p], new, **params)[0]


@pytest.fixture
def generator() -> Generator:
    return Generator(tiny_model(), max_seq_len=256, batch_size=4)


@pytest.fixture
def prefilled(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prefill of `generator` had to run, longest row."""
    lengths = []
    prefill = generator.prefill

    def watched(prompts: Sequence[Sequence[int]], start: int, *rest) -> None:
        lengths.append(max(map(len, prompts)) - start)
        prefill(prompts, start, *rest)

    monkeypatch.setattr(generator, "prefill", watched)
    return lengths


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_whole_forward_passes(generator: Generator) -> None:
    tokens = prompt(9)
    (found,) = answers(generator, [tokens], 12)
    model = tiny_model()
    for token in found:
        cache = Generator(model, max_seq_len=64).cache.narrow(len(tokens))
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], cache)
        assert token == logits[0, -1].argmax()
        tokens = [*tokens, token]
    assert len(set(found)) > 4  # it is a test only if the tokens vary


@pytest.mark.parametrize("params", [{}, SAMPLED, {"repetition_penalty": 1.5, "frequency_penalty": 0.3}])
@pytest.mark.parametrize("lengths", [(3, 90, 17, 2), (1, 64), (8, 8, 8)])
def test_rows_of_a_batch_get_what_they_get_alone(generator: Generator, lengths: tuple, params: dict) -> None:
    prompts = [prompt(length, seed=length + row) for row, length in enumerate(lengths)]
    assert answers(generator, prompts, **params) == [fresh(p, **params) for p in prompts]


def test_rows_may_be_sampled_differently(generator: Generator) -> None:
    params = [{}, SAMPLED, {**SAMPLED, "seed": 4}, {"temperature": 1.5, "top_k": 5}]
    requests = [Request(prompt=prompt(6), params=SamplingParams(**p), max_new_tokens=24) for p in params]
    found = run(generator, *requests)
    assert found == [fresh(prompt(6), **p) for p in params]
    assert len({tuple(row) for row in found}) == 4


def test_rows_finish_one_by_one(generator: Generator) -> None:
    whole = fresh(prompt(7))
    stop = whole[10]
    requests = [
        Request(prompt=prompt(7), max_new_tokens=24),
        Request(prompt=prompt(7), max_new_tokens=24, stop_ids=frozenset({stop, 1000})),
        Request(prompt=prompt(7), max_new_tokens=5),
        Request(prompt=prompt(7), max_new_tokens=1),
    ]
    assert run(generator, *requests) == [whole, whole[: whole.index(stop)], whole[:5], whole[:1]]
    assert [r.finish_reason for r in requests] == ["length", "stop", "length", "length"]


def test_a_stop_id_may_be_the_first_token(generator: Generator) -> None:
    request = Request(prompt=prompt(7), stop_ids=frozenset(fresh(prompt(7), 1)))
    assert run(generator, request) == [[]]
    assert request.finish_reason == "stop"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_context_limits_an_answer(batch: int) -> None:
    generator = Generator(tiny_model(), max_seq_len=64, batch_size=batch)  # no slot more than the context
    requests = [Request(prompt=prompt(n), max_new_tokens=100) for n in (63, 3, 40)[:batch]]
    assert run(generator, *requests) == [fresh(prompt(n), 64 - n) for n in (63, 3, 40)[:batch]]
    assert {r.finish_reason for r in requests} == {"length"}


def test_the_models_own_context_is_not_exceeded() -> None:
    generator = Generator(tiny_model(replace(TINY, max_seq_len=24)), max_seq_len=10_000)
    assert generator.max_seq_len == 24
    assert len(answers(generator, [prompt(20)], 100)[0]) == 4


def test_a_prompt_of_one_token_and_an_answer_of_one_token(generator: Generator) -> None:
    assert answers(generator, [[5]], 1) == [fresh([5], 1)]
    assert answers(generator, [[5]], 2) == [fresh([5], 24)[:2]]


def test_run_yields_once_for_every_token(generator: Generator) -> None:
    long = Request(prompt=prompt(4), max_new_tokens=9)
    short = Request(prompt=prompt(30), max_new_tokens=3)
    counts = {long: 0, short: 0}
    for request in generator.run([long, short]):
        counts[request] += 1
        assert len(request.token_ids) == counts[request]
    assert counts == {long: 9, short: 3}
    stopped = Request(prompt=prompt(4), max_new_tokens=9, stop_ids=frozenset({long.token_ids[2]}))
    seen = [len(r.token_ids) for r in generator.run([stopped])]
    assert seen == [1, 2, 2]  # the last one says that it finished


def test_finishing_a_request_from_outside_ends_it(generator: Generator) -> None:
    requests = [Request(prompt=prompt(4), max_new_tokens=20), Request(prompt=prompt(5), max_new_tokens=20)]
    for request in generator.run(requests):
        if request is requests[0] and len(request.token_ids) == 3:
            request.finish_reason = "stop"
    assert [len(r.token_ids) for r in requests] == [3, 20]


@pytest.mark.parametrize("new", [1, 2, 5, 6, 24])
@pytest.mark.parametrize("params", [{}, SAMPLED])
def test_steps_in_bursts_give_the_same_tokens(generator: Generator, new: int, params: dict) -> None:
    bursts = Generator(tiny_model(), max_seq_len=256, batch_size=4)
    bursts.burst, bursts.tokens = 4, bursts.tokens.new_zeros(4, 4, 1)  # as on a GPU
    for prompts in ([prompt(5)], [prompt(3), prompt(40), prompt(8)]):
        assert answers(bursts, prompts, new, **params) == answers(generator, prompts, new, **params)
    stop = frozenset(answers(generator, [prompt(5)], 24, **params)[0][2:3])
    ended = [
        Request(prompt=prompt(5), params=SamplingParams(**params), max_new_tokens=new, stop_ids=stop) for _ in "ab"
    ]
    assert run(bursts, ended[0]) == run(generator, ended[1])


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_prefill_in_chunks_gives_the_same_tokens(generator: Generator, chunk: int) -> None:
    generator.prefill_tokens = chunk
    assert answers(generator, [prompt(22)]) == [fresh(prompt(22))]
    prompts = [prompt(22), prompt(1), prompt(9), prompt(8)]
    assert answers(generator, prompts) == [fresh(p) for p in prompts]


def test_a_prompt_that_cannot_be_run_says_why(generator: Generator) -> None:
    with pytest.raises(ValueError, match=r"^the prompt is empty; give at least one token$"):
        answers(generator, [[]])
    with pytest.raises(ValueError, match=r"has 256 tokens and the context holds 256.*shorten the prompt"):
        answers(generator, [prompt(3), prompt(256)])
    with pytest.raises(ValueError, match="got 5 requests for a batch size of 4"):
        answers(generator, [prompt(3)] * 5)
    assert answers(generator, [prompt(3)]) == [fresh(prompt(3))]  # a refused request spoils nothing


def test_sliding_windows_and_bf16_decode_in_batches_too() -> None:
    config = replace(TINY, sliding_window=6, sliding_layers=(1,))
    generator = Generator(tiny_model(config), max_seq_len=128, batch_size=2)
    prompts = [prompt(40), prompt(4)]
    assert answers(generator, prompts) == [answers(generator, [p])[0] for p in prompts]
    half = Generator(tiny_model(dtype=torch.bfloat16), max_seq_len=128)
    assert len(answers(half, [prompt(40)])[0]) == 24


# ---- Reuse of the prefix --------------------------------------------------------------------------------------------


def test_a_prompt_that_goes_on_reuses_the_cache(generator: Generator, prefilled: list[int]) -> None:
    (first,) = answers(generator, [prompt(30)], 10)
    longer = [*prompt(30), *first, 7, 8, 9]
    assert answers(generator, [longer]) == [fresh(longer)]
    assert prefilled == [30, 4]  # the newest token of an answer has not been through the model yet


def test_a_changed_prompt_reuses_what_is_before_the_change(generator: Generator, prefilled: list[int]) -> None:
    answers(generator, [prompt(30)], 10)
    changed = [*prompt(30)[:12], (prompt(30)[12] + 1) % TINY.vocab_size, *prompt(30)[13:]]
    assert answers(generator, [changed]) == [fresh(changed)]
    assert prefilled == [30, 18]


def test_the_same_and_a_shorter_prompt_run_their_last_token(generator: Generator, prefilled: list[int]) -> None:
    for length in (30, 30, 12):
        assert answers(generator, [prompt(30)[:length]]) == [fresh(prompt(30)[:length])]
    assert prefilled == [30, 1, 1]


@pytest.mark.parametrize("taken", [1, 2, 6])
def test_the_cache_is_right_after_the_caller_stopped_early(generator: Generator, taken: int) -> None:
    whole = fresh(prompt(30))
    request = Request(prompt=prompt(30), max_new_tokens=24)
    iterator = generator.run([request])
    for _ in itertools.islice(iterator, taken):
        pass
    iterator.close()
    longer = [*prompt(30), *request.token_ids, 1, 2]
    assert request.token_ids == whole[:taken]
    assert answers(generator, [longer]) == [fresh(longer)]


def test_early_stop_keeps_the_prefix(generator: Generator, prefilled: list[int]) -> None:
    request = Request(prompt=prompt(30), max_new_tokens=24)
    iterator = generator.run([request])
    for _ in itertools.islice(iterator, 6):
        pass
    iterator.close()
    answers(generator, [[*prompt(30), *request.token_ids, 1, 2]])
    assert prefilled == [30, 3]


def test_a_stopped_answer_and_a_batch_leave_a_right_cache(generator: Generator) -> None:
    whole = fresh(prompt(30))
    run(generator, Request(prompt=prompt(30), max_new_tokens=24, stop_ids=frozenset({whole[5]})))
    assert answers(generator, [[*prompt(30), 1, 2, 3]]) == [fresh([*prompt(30), 1, 2, 3])]
    answers(generator, [prompt(30, seed=5), prompt(9, seed=6)])
    assert answers(generator, [[*prompt(30), 1, 2, 3]]) == [fresh([*prompt(30), 1, 2, 3])]


# ---- Compiled -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(cache_folder: Path) -> Iterator[Generator]:
    """One for the whole module: compiling takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TACHYON_CACHE", str(cache_folder))
        yield Generator(tiny_model(), max_seq_len=256, batch_size=3, compile=True)


@pytest.mark.parametrize("lengths", [(1,), (2,), (7,), (64,), (150,), (5, 30, 12)])
def test_compiled_gives_the_eager_tokens(compiled: Generator, lengths: tuple[int, ...]) -> None:
    prompts = [prompt(length, seed=length) for length in lengths]
    assert answers(compiled, prompts, 40) == [fresh(p, 40) for p in prompts]


@pytest.mark.parametrize("lengths", [(9,), (5, 30, 12)])
def test_compiled_samples_the_eager_tokens(compiled: Generator, lengths: tuple[int, ...]) -> None:
    prompts = [prompt(length, seed=length) for length in lengths]
    assert answers(compiled, prompts, 40, **SAMPLED) == [fresh(p, 40, **SAMPLED) for p in prompts]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_compiled_gives_the_eager_tokens_over_a_cache_of_codes(compiled: Generator, kv_dtype: str) -> None:
    # The model that another cache's library was compiled for.
    generator = Generator(compiled.model, max_seq_len=256, batch_size=3, compile=True, kv_dtype=kv_dtype)
    for lengths in ((1,), (70,), (5, 30)):
        prompts = [prompt(length, seed=length) for length in lengths]
        assert answers(generator, prompts, 40) == [fresh(p, 40, kv_dtype=kv_dtype) for p in prompts]
    assert answers(compiled, [prompt(70)], 40) == [fresh(prompt(70), 40)]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_cache_of_codes_is_reused_and_cut_into_chunks(monkeypatch: pytest.MonkeyPatch, kv_dtype: str) -> None:
    generator = Generator(tiny_model(), max_seq_len=256, batch_size=2, kv_dtype=kv_dtype)
    assert answers(generator, [prompt(40)]) == [fresh(prompt(40), kv_dtype=kv_dtype)]
    longer = [*prompt(40), 1, 2, 3]
    assert answers(generator, [longer]) == [fresh(longer, kv_dtype=kv_dtype)]
    monkeypatch.setattr(Generator, "prefill_tokens", 14)
    assert answers(generator, [prompt(45), prompt(9)]) == [fresh(p, kv_dtype=kv_dtype) for p in (prompt(45), prompt(9))]


def test_a_cache_cannot_be_stored_in_any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="int4; there are int8, fp8"):
        Generator(tiny_model(), max_seq_len=8, kv_dtype="int4")
    monkeypatch.setattr(hardware, "has_fp8", lambda device: False)
    with pytest.raises(ValueError, match="take --kv-dtype int8"):
        Generator(tiny_model(), max_seq_len=8, kv_dtype="fp8")
    Generator(tiny_model(), max_seq_len=8, kv_dtype="int8")


def test_no_prompt_length_recompiles(compiled: Generator) -> None:
    answers(compiled, [prompt(7)], 4)
    before = counters["stats"]["unique_graphs"]
    for length in range(10, 210, 10):
        answers(compiled, [prompt(length, seed=length)], 4)
    assert counters["stats"]["unique_graphs"] == before


def test_compiled_reuses_a_prefix(compiled: Generator) -> None:
    for length in (20, 40, 33):
        assert answers(compiled, [prompt(60)[:length]]) == [fresh(prompt(60)[:length])]


def test_warming_up_changes_no_answer(compiled: Generator) -> None:
    compiled.warm_up([Request(prompt=prompt(20), max_new_tokens=30)])
    assert answers(compiled, [prompt(20)], 30) == [fresh(prompt(20), 30)]


def test_warming_up_an_eager_generator_changes_no_answer(generator: Generator) -> None:
    run(generator, Request(prompt=[0] * 20))
    generator.warm_up([Request(prompt=prompt(20), max_new_tokens=30, params=SamplingParams(frequency_penalty=0.5))])
    assert answers(generator, [prompt(20)], 30) == [fresh(prompt(20), 30)]
    penalized = {"frequency_penalty": 0.5}
    assert answers(generator, [prompt(20)], 30, **penalized) == [fresh(prompt(20), 30, **penalized)]


def test_sampling_of_one_kind_shares_its_memory(generator: Generator) -> None:
    for seed in (1, 2):
        params = {"temperature": 0.5 + seed, "seed": seed, "presence_penalty": 0.5}
        assert answers(generator, [prompt(4)], **params) == [fresh(prompt(4), **params)]
    assert len(generator.samplings) == 1
    answers(generator, [prompt(4)])
    answers(generator, [prompt(4), prompt(5)])
    assert len(generator.samplings) == 3


# ---- Text -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


def stream(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], Answer]:
    """The pieces that an answer shows, one token at a time, until it ends by its length or a stop string."""
    request = Request(prompt=[1])
    answer, pieces = Answer(request, tokenizer, stop), []
    for token in ids:
        request.token_ids.append(token)
        if len(request.token_ids) == len(ids):
            request.finish_reason = "length"
        pieces.append(answer.update())
        if request.finish_reason is not None:
            break
    return pieces, answer


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of single bytes, so that every string is split over many tokens."""
    ids = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [ids[bytes([byte])] for byte in text.encode()]


def test_pieces_join_to_the_text_and_hold_no_half_characters(tokenizer: Tokenizer) -> None:
    text = "naïve 你好 👩‍👩‍👧 end"
    pieces, answer = stream(tokenizer, letters(tokenizer, text))
    assert "".join(pieces) == text == answer.text
    assert "\ufffd" not in "".join(pieces)
    assert answer.request.finish_reason == "length"


def test_a_character_that_stays_incomplete_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    pieces, answer = stream(tokenizer, letters(tokenizer, "a好")[:-1])
    assert pieces == ["a", "", "\ufffd"]
    assert answer.text == "a\ufffd"


@pytest.mark.parametrize("text", ["one STOP two", "one STOP", "one STSTOP", "STOP"])
def test_a_stop_string_over_many_tokens_ends_the_answer_and_is_not_shown(tokenizer: Tokenizer, text: str) -> None:
    pieces, answer = stream(tokenizer, letters(tokenizer, text), stop=["STOP"])
    assert "".join(pieces) == answer.text == text[: text.index("STOP")]
    assert answer.request.finish_reason == "stop"
    assert not any("STO" in piece for piece in itertools.accumulate(pieces))


def test_what_only_began_like_a_stop_string_is_shown_later(tokenizer: Tokenizer) -> None:
    pieces, answer = stream(tokenizer, letters(tokenizer, "aST bSTO"), stop=["STOP"])
    assert pieces == ["a", "", "", "ST ", "b", "", "", "STO"]
    assert answer.request.finish_reason == "length"


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    (token,) = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b" there"]
    for stops in (["re", "he"], ["he", "re"], ["there", "he", "x"]):
        pieces, answer = stream(tokenizer, [*letters(tokenizer, "so "), token, token], stop=stops)
        assert "".join(pieces) == answer.text == "so  there"[: min("so  there".find(s) for s in stops if s != "x")]
        assert answer.request.finish_reason == "stop"


def test_a_stop_string_of_half_a_character_boundary(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, letters(tokenizer, "ab好cd"), stop=["好"])
    assert "".join(pieces) == "ab"


def test_update_sees_every_token_since_the_last_one_and_may_be_called_again(tokenizer: Tokenizer) -> None:
    request = Request(prompt=[1], token_ids=letters(tokenizer, "hello"))
    answer = Answer(request, tokenizer)
    assert (answer.update(), answer.update()) == ("hello", "")
    request.finish_reason = "stop"
    assert (answer.update(), answer.update(), answer.text) == ("", "", "hello")


# ---- Figures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fixed_bandwidth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TACHYON_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "measure_read_bandwidth", lambda device: 1e9)


@pytest.mark.usefixtures("fixed_bandwidth")
def test_stats_count_tokens_and_agree_with_each_other(generator: Generator) -> None:
    meter = Meter(generator)
    for new in (5, 3):
        for _ in meter.run(
            [Request(prompt=prompt(4), max_new_tokens=new), Request(prompt=prompt(9), max_new_tokens=2)]
        ):
            pass
    stats = meter.stats(load_s=1.5, compile_s=0.5)
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (26, 12)
    assert stats["ttft_s"] > 0
    assert stats["decode_tok_s"] > 0
    assert stats["bandwidth_fraction"] == pytest.approx(stats["decode_gbs"] / stats["read_gbs"])
    assert (stats["load_s"], stats["compile_s"], stats["read_gbs"], stats["dtype"]) == (1.5, 0.5, 1.0, "float32")
    assert stats["peak_memory_gb"] > 0
    text = describe(json.loads(json.dumps(stats)))
    assert "12 new tokens" in text
    assert "\n" not in text


@pytest.mark.usefixtures("fixed_bandwidth")
def test_stats_without_decoding_have_no_speed(generator: Generator) -> None:
    meter = Meter(generator)
    assert "none" in describe(meter.stats(load_s=0.0, compile_s=0.0))
    for _ in meter.run([Request(prompt=prompt(4), max_new_tokens=1)]):
        pass
    stats = meter.stats(load_s=0.0, compile_s=0.0)
    assert (stats["new_tokens"], stats["decode_tok_s"], stats["decode_gbs"]) == (1, 0.0, 0.0)


def test_a_step_reads_every_weight_once_and_the_live_cache(generator: Generator) -> None:
    model = generator.model
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes  # of which it reads one row
    per_slot = 2 * TINY.n_layers * TINY.n_kv_heads * TINY.head_dim * 4
    assert generator.step_bytes(100) == weights + 100 * per_slot
    assert generator.step_bytes(100, rows=3) == weights + 300 * per_slot
    int8 = Generator(model, max_seq_len=128, kv_dtype="int8")
    assert int8.step_bytes(100) == weights + 100 * per_slot // 4 // TINY.head_dim * (TINY.head_dim + 4)
    tied = Generator(tiny_model(replace(TINY, tied_head=True)), max_seq_len=64)
    assert tied.step_bytes(1) == sum(p.nbytes for p in tied.model.parameters()) + per_slot  # the head is read whole


# ---- Prompts and options --------------------------------------------------------------------------------------------


def prompts_of(path: Path, data: str | bytes) -> list[str]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_prompts(Options(prompt_file=path))


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\r\n\n   \ntwo", ["one", "two"]),
        ("  spaces stay \n", ["  spaces stay "]),
        ('["one\\nline", "two"]', ["one\nline", "two"]),
        ('\n [\n"one"\n]\n', ["one"]),
        ("你好\nschön", ["你好", "schön"]),
    ],
)
def test_prompt_files_hold_lines_or_a_json_list(tmp_path: Path, data: str, prompts: list[str]) -> None:
    assert prompts_of(tmp_path / "prompts", data) == prompts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "has no prompt: write one a line, or a JSON list of strings"),
        (" \n\n", "has no prompt"),
        ("[]", "has no prompt"),
        ('["one", 2]', "must be a JSON list of strings"),
        ('["one",', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_prompt_files_that_cannot_be_used_are_named(tmp_path: Path, data: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prompts_of(tmp_path / "prompts", data)
    assert str(tmp_path / "prompts") in str(error.value)


def test_a_prompt_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read_prompts(Options(prompt_file=tmp_path / "missing"))


def test_the_prompt_is_taken_as_it_is() -> None:
    assert read_prompts(Options(prompt=" a\nb ")) == [" a\nb "]


def test_standard_input_is_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n")))
    assert read_prompts(Options()) == ["two\nlines"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    with pytest.raises(ValueError, match="no prompt: give --prompt TEXT"):
        read_prompts(Options())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1; got 0"),
        ({"num_samples": -1}, "--num-samples must be at least 1; got -1"),
        ({"batch_size": 0}, "--batch-size must be at least 1; got 0"),
        ({"max_seq_len": 0}, "--max-seq-len must be at least 1; got 0"),
        ({"prompt": "a", "prompt_file": Path("b")}, "give --prompt or --prompt-file, not both"),
        ({"interactive": True, "prompt": ""}, "--interactive reads its prompts from you"),
        ({"interactive": True, "prompt_file": Path("b")}, "--interactive reads its prompts from you"),
        ({"interactive": True, "json": True}, "--interactive reads its prompts from you"),
        ({"stop": ("a", "")}, "--stop must not be empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)
