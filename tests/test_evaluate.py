"""scripts/evaluate.py: perplexity and likelihoods against plain torch, and what its command line says."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from checkpoint import load_model, open_checkpoint, save_model
from generate import Generator
from scripts import evaluate, scoring
from scripts.evaluate import Options, TaskModel
from tests.conftest import TINY, new_cache, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog; naïve café. " * 3
LIMIT = 40  # the model's max_seq_len


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny checkpoint whose tokens are bytes, and an end-of-text token."""
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    save_model(tiny_model(replace(TINY, vocab_size=257, max_seq_len=LIMIT)), folder, eos_ids=(256,))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def options(directory, text) -> Options:
    return Options(checkpoint=str(directory), text=text, context=32, dtype="float32", device="cpu")


@torch.no_grad()
def log_probs(directory: Path, tokens: list[int]) -> torch.Tensor:
    """Log probabilities [T, V] after each of the tokens, in one plain pass."""
    model = load_model(open_checkpoint(str(directory)), device="cpu", dtype=torch.float32)
    T = len(tokens)
    logits = model(torch.tensor([tokens]), torch.arange(T)[None], new_cache(model, batch=1, length=T))
    return logits[0].double().log_softmax(-1)


def slow_nll(directory: Path, *, context: int, windows: int) -> float:
    tokens = open_checkpoint(str(directory)).tokenizer.encode(TEXT, special=False)
    total = 0.0
    for i in range(windows):
        window = tokens[i * context : (i + 1) * context]
        targets = tokens[i * context + 1 : (i + 1) * context + 1]
        total -= sum(row[target].item() for row, target in zip(log_probs(directory, window), targets, strict=True))
    return total / (windows * context)


# ---- Perplexity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "windows", "batch"), [(32, None, 1), (32, None, 3), (32, 2, 2), (7, 5, 4), (1, 9, 9)]
)
def test_perplexity_is_that_of_a_plain_computation(options, directory, context, windows, batch):
    result = evaluate.evaluate(replace(options, context=context, windows=windows, batch=batch))
    windows = windows or (len(TEXT.encode()) - 1) // context
    nll = slow_nll(directory, context=context, windows=windows)
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert (result["windows"], result["tokens"], result["bytes"]) == (windows, windows * context, windows * context)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2), rel=1e-5)  # a token is a byte here


def test_logits_and_prompts_in_small_pieces_change_nothing(options, monkeypatch):
    expected = evaluate.evaluate(replace(options, batch=3))["nll"]
    monkeypatch.setattr(scoring, "LOGITS", 5 * 257)
    monkeypatch.setattr(Generator, "prefill_tokens", 21)
    assert evaluate.evaluate(replace(options, batch=3))["nll"] == pytest.approx(expected, rel=1e-6)


def test_all_windows_need_one_token_more_than_they_predict(options, text):
    size = len(TEXT.encode())
    exact = evaluate.evaluate(replace(options, context=LIMIT, windows=(size - 1) // LIMIT))
    assert exact["windows"] == (size - 1) // LIMIT
    text.write_text("x" * 64)
    with pytest.raises(ValueError, match="2 windows of 32 tokens need 65 tokens and the text has 64; give a longer"):
        evaluate.evaluate(replace(options, windows=2))
    text.write_text("x" * 65)
    assert evaluate.evaluate(replace(options, windows=2))["tokens"] == 64
    text.write_text("")
    with pytest.raises(ValueError, match="1 windows of 32 tokens need 33 tokens and the text has 0"):
        evaluate.evaluate(options)


def test_bf16_is_near(options):
    exact, rounded = (evaluate.evaluate(replace(options, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rounded["nll"] == pytest.approx(exact["nll"], rel=0.02)
    assert rounded["dtype"] == "bfloat16"


# ---- The command line -----------------------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess:
    root = Path(evaluate.__file__).parents[1]
    full = [sys.executable, "-m", "scripts.evaluate", *map(str, arguments)]
    return subprocess.run(full, cwd=root, capture_output=True, text=True)


def test_json_is_one_document_and_nothing_else(directory, text):
    done = command("--checkpoint", directory, "--text", text, "--context", 32, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= {"perplexity", "nll", "bits_per_byte", "tokens", "seconds", "tok_s", "device", "dtype"}
    assert (result["checkpoint"], result["text"], result["context"]) == (str(directory), str(text), 32)


def test_too_short_a_text_is_one_line_and_exit_code_2(directory, text):
    done = command("--checkpoint", directory, "--text", text, "--context", 40, "--windows", 99)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "need 3961 tokens and the text has 177" in done.stderr


def test_people_get_lines(options, directory, text, capsys):
    evaluate.main(["--checkpoint", str(directory), "--text", str(text), "--context", "32", "--device", "cpu"])
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": None}, "nothing to evaluate: give --text FILE, --tasks NAMES, or both"),
        ({"context": 0}, "--context must be at least 1; got 0"),
        ({"windows": -1}, "--windows must be at least 1; got -1"),
        ({"batch": 0}, "--batch must be at least 1; got 0"),
        ({"context": LIMIT + 1}, f"--context {LIMIT + 1} is more than the {LIMIT} that "),
        ({"checkpoint": "random:smollm2-135m"}, "has no tokenizer"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
    ],
)
def test_mistakes_are_named(options, arguments, message):
    with pytest.raises(ValueError) as error:
        evaluate.evaluate(replace(options, **arguments))
    assert message in str(error.value)


def test_a_text_that_cannot_be_read_is_named(options, text):
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8"):
        evaluate.evaluate(options)
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        evaluate.evaluate(replace(options, text=text.with_name("missing.txt")))


def test_tasks_without_lm_eval_say_how_to_get_it(options, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tasks needs lm-eval, which is not installed: pip install -e \.\[eval\]"):
        evaluate.evaluate(replace(options, tasks="hellaswag"))


# ---- Tasks ----------------------------------------------------------------------------------------------------------


def requests_of(*args: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=a) for a in args]


@pytest.fixture
def task_model(directory, options) -> TaskModel:
    source = open_checkpoint(str(directory))
    model = load_model(source, device="cpu", dtype=torch.float32)
    return TaskModel(model, source.tokenizer, source.eos_ids, replace(options, batch=3))


def slow_likelihood(directory: Path, before: list[int], after: list[int]) -> float:
    rows = log_probs(directory, (before + after)[:-1])[-len(after) :]
    return sum(row[token].item() for row, token in zip(rows, after, strict=True))


def test_loglikelihood_is_of_the_continuation_given_the_context(task_model, directory):
    pairs = [("The fox", " jumps"), ("a", "b"), ("", "over"), ("The lazy ", "dog"), ("x" * 60, "yz"), ("The fox", " x")]
    encode = task_model.tokenizer.encode
    expected = []
    for context, continuation in pairs:
        before, after = encode(context), encode(continuation)
        before = (before or [256])[-(LIMIT + 1 - len(after)) :]  # an empty context is the end-of-text token
        if context.endswith(" "):
            before, after = before[:-1], before[-1:] + after
        expected.append(slow_likelihood(directory, before, after))
    got = task_model.loglikelihood(requests_of(*pairs))
    assert [likelihood for likelihood, _ in got] == pytest.approx(expected, rel=1e-4)


def test_loglikelihood_says_whether_greedy_decoding_gives_the_continuation(task_model, directory):
    tokenizer = task_model.tokenizer
    best = [tokenizer.decode([t]) for t in log_probs(directory, tokenizer.encode(TEXT[:LIMIT])).argmax(-1).tolist()]
    last = next(i for i, text in enumerate(best) if text.isalpha())  # most tokens are no character of their own
    context, greedy = TEXT[: last + 1], best[last]
    other = "a" if greedy != "a" else "b"
    got = task_model.loglikelihood(requests_of((context, greedy), (context, other), (context, greedy + "~"), ("", "")))
    assert [is_greedy for _, is_greedy in got] == [True, False, False, True]


def test_rolling_loglikelihood_predicts_every_token_once(task_model, directory):
    texts = ["x", TEXT[:LIMIT], TEXT[: LIMIT + 1], TEXT[: 2 * LIMIT + 7], ""]
    expected = []
    for text in texts:
        tokens, total = [256, *task_model.tokenizer.encode(text)], 0.0
        for begin in range(1, len(tokens), LIMIT):
            end = min(begin + LIMIT, len(tokens))
            first = max(0, end - LIMIT - 1)
            total += slow_likelihood(directory, tokens[first:begin], tokens[begin:end])
        expected.append(total)
    got = task_model.loglikelihood_rolling(requests_of(*[(text,) for text in texts]))
    assert got == pytest.approx(expected, rel=1e-4)


def test_generate_until_stops_at_a_string_or_a_length(task_model):
    how = {"max_gen_toks": 12}
    contexts = ["The quick brown", "fox", "dog; naive", "a"]
    whole = task_model.generate_until(requests_of(*[(context, how) for context in contexts]))
    one_by_one = [task_model.generate_until(requests_of((context, how)))[0] for context in contexts]
    assert whole == one_by_one and len(set(whole)) > 1
    until = whole[0][4:6]
    cut = task_model.generate_until(requests_of((contexts[0], {**how, "until": [until]})))[0]
    assert cut == whole[0][: whole[0].index(until)]
    assert task_model.generate_until(requests_of((contexts[0], {**how, "until": until})))[0] == cut


def test_generate_until_drops_the_beginning_of_what_is_too_long(task_model):
    long, short = ("y" * 100 + "The quick brown fox jumps ov", "The quick brown fox jumps ov")
    how = {"max_gen_toks": LIMIT - len(short)}
    assert task_model.generate_until(requests_of((long, how))) == task_model.generate_until(requests_of((short, how)))
