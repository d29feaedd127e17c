"""scripts/evaluate.py: perplexity and likelihoods against plain torch, and what its command line says."""

import gc
import importlib.util
import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

import checkpoint
from checkpoint import load_model, open_checkpoint, save_model
from generator import Generator
from quant.linears import RECIPES
from scripts import bench, compare, evaluate, scoring
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
def log_probs(directory: Path, tokens: list[int], *, quantize: str | None = None) -> torch.Tensor:
    """Log probabilities [T, V] after each of the tokens, in one plain pass."""
    model = load_model(open_checkpoint(str(directory)), device="cpu", dtype=torch.float32, quantize=quantize)
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


# ---- Models side by side --------------------------------------------------------------------------------------------


@pytest.fixture
def compared(options, directory, cache_folder, monkeypatch) -> Options:
    """Comparing the model with what it is in 8 bits; decoding is not what takes the time."""
    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))
    monkeypatch.setattr(compare, "SPEED", {"prompt_len": 4, "new_tokens": 3, "repeats": 1})
    names = (str(directory), f"{directory}+int8", f"{directory}+fp8")
    return replace(options, checkpoint=checkpoint.DEFAULT_CHECKPOINT, compare=names, windows=3)


@pytest.mark.parametrize(("batch", "logits"), [(1, 2**25), (2, 2**25), (2, 5 * 257)])
def test_divergence_and_agreement_are_those_of_a_plain_computation(
    compared, directory, batch, logits, monkeypatch, tmp_path
):
    monkeypatch.setattr(scoring, "LOGITS", logits)
    another, config = tmp_path / "another", replace(TINY, vocab_size=257, max_seq_len=LIMIT)
    save_model(tiny_model(config, seed=1), another, tokenizer=open_checkpoint(str(directory)).tokenizer)
    names = (str(directory), f"{directory}+int8", str(another))
    plain, *others = evaluate.run_compare(replace(compared, compare=names, batch=batch))["models"]
    assert (plain["kl"], plain["agreement"]) == (0.0, 1.0)
    assert plain["nll"] == pytest.approx(slow_nll(directory, context=32, windows=3), rel=1e-5)
    tokens = open_checkpoint(str(directory)).tokenizer.encode(TEXT, special=False)
    for figures, (folder, quantize) in zip(others, ((directory, "int8"), (another, None)), strict=True):
        divergence = agreed = nll = 0.0
        for i in range(0, 96, 32):
            p = log_probs(directory, tokens[i : i + 32])
            q = log_probs(folder, tokens[i : i + 32], quantize=quantize)
            divergence += (p.exp() * (p - q)).sum().item() / 96
            agreed += (p.argmax(-1) == q.argmax(-1)).sum().item() / 96
            nll -= q[torch.arange(32), tokens[i + 1 : i + 33]].sum().item() / 96
        assert figures["kl"] == pytest.approx(divergence, rel=1e-3) and figures["kl"] > 0
        assert figures["agreement"] == pytest.approx(agreed)
        assert figures["nll"] == pytest.approx(nll, rel=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)


def test_size_counts_a_tied_head_once_and_scales(compared, directory, tmp_path):
    source, config = open_checkpoint(str(directory)), replace(TINY, vocab_size=257, max_seq_len=LIMIT, tied_head=True)
    save_model(tiny_model(config), tmp_path / "tied", tokenizer=source.tokenizer)
    names = (str(tmp_path / "tied"), f"{tmp_path / 'tied'}+int8")
    plain, int8 = evaluate.run_compare(replace(compared, compare=names))["models"]
    layers = 2 * (48 * (48 + 2 * 16) + 48 * 48 + 3 * 48 * 80)
    norms, rows = 5 * 48, 2 * (80 + 48 + 160 + 48) + 257
    assert plain["bytes"] == 4 * (257 * 48 + layers + norms)
    assert int8["bytes"] == 4 * (257 * 48 + norms + rows) + 257 * 48 + layers
    assert plain["bits_per_weight"] == 32
    assert int8["bits_per_weight"] == pytest.approx(8 + 32 * rows / (257 * 48 + layers))
    assert (plain["quantize"], int8["quantize"]) == (None, "int8")


def test_models_are_held_one_at_a_time(compared, monkeypatch):
    models = []

    def load(*args, **options):
        gc.collect()
        assert all(model() is None for model in models)
        models.append(weakref.ref(model := load_model(*args, **options)))
        return model

    monkeypatch.setattr(checkpoint, "load_model", load)
    evaluate.run_compare(compared)
    assert len(models) == 3


def test_a_cache_of_codes_is_measured_as_a_variant(compared):
    name = compared.compare[0]
    kv = ("", "+kv-int8", "+kv-fp8")
    options = replace(compared, compare=tuple(name + variant for variant in kv))
    plain, int8, fp8 = evaluate.run_compare(options)["models"]
    assert [m["kv_dtype"] for m in (plain, int8, fp8)] == [None, "int8", "fp8"]
    assert plain["bytes"] == int8["bytes"] == fp8["bytes"]  # of the model
    assert plain["kl"] == pytest.approx(0, abs=1e-6) and 0 < int8["kl"] < fp8["kl"] < 0.05
    # The cache is what decoding reads less of.
    assert plain["decode_gbs"] / plain["decode_tok_s"] > int8["decode_gbs"] / int8["decode_tok_s"]


def test_speed_is_what_bench_measures(compared, monkeypatch):
    seen = []
    time_model = bench.time_model
    monkeypatch.setattr(
        bench, "time_model", lambda *args, **options: seen.append(time_model(*args, **options)) or seen[-1]
    )
    models = evaluate.run_compare(compared)["models"]
    assert [m["decode_tok_s"] for m in models] == [s["decode_tok_s"] for s in seen]
    assert all(0 < m["bandwidth_fraction"] == pytest.approx(m["decode_gbs"] / 1000) for m in models)


def test_a_comparison_is_a_table_or_one_document(compared, directory, text, capsys):
    arguments = ["--compare", *compared.compare, "--text", text, "--context", 32, "--device", "cpu"]
    evaluate.main([str(a) for a in arguments])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(compared.compare)
    evaluate.main([str(a) for a in (*arguments, "--json")])
    document = json.loads(capsys.readouterr().out)
    assert [m["model"] for m in document["models"]] == list(compared.compare)
    assert (document["context"], document["text"], document["dtype"]) == (32, str(text), "bfloat16")


@pytest.mark.parametrize(
    ("item", "spec", "quantize", "kv_dtype"),
    [
        ("smollm2-135m", "smollm2-135m", None, None),
        ("smollm2-135m+int8", "smollm2-135m", "int8", None),
        ("smollm2-135m+kv-fp8", "smollm2-135m", None, "fp8"),
        ("smollm2-135m+kv-int8+int4", "smollm2-135m", "int4", "int8"),
        ("models/a+b.gguf+int4", "models/a+b.gguf", "int4", None),
        ("there+int8", "there+int8", None, None),
        ("there+int8+fp8", "there+int8", "fp8", None),
        ("./+int8", "./", "int8", None),
        ("org/name@v1+cuda", "org/name@v1+cuda", None, None),
        ("org/name@v1+cuda+int4", "org/name@v1+cuda", "int4", None),
    ],
)
def test_what_follows_a_plus_is_done_while_loading_unless_it_is_a_files_name(
    item, spec, quantize, kv_dtype, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there+int8").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a+b.gguf").touch()
    variant = compare.parse_variant(item)
    assert variant == compare.Variant(name=item, checkpoint=spec, quantize=quantize, kv_dtype=kv_dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compare": ("a",)}, "takes a reference and models to hold against it; got a alone"),
        ({"text": None}, "--compare measures on a text; give --text FILE"),
        ({"checkpoint": "other"}, "--checkpoint does not go with --compare: the first model of --compare is"),
        ({"quantize": "int8"}, "--quantize does not go with --compare: write --compare CKPT+FORMAT"),
        ({"kv_dtype": "int8"}, "--kv-dtype does not go with --compare: write --compare CKPT+kv-FORMAT"),
        ({"tasks": "hellaswag"}, "--tasks does not go with --compare"),
        ({"compare": (), "plot": Path("a.png")}, "--plot draws what is compared; give --compare"),
        (
            {"compare": ("a+int9", "b")},
            "--compare a+int9: no such file, and 'int9' after the plus is none of int8, int4",
        ),
        ({"compare": ("a+int8+fp8", "b")}, "--compare a+int8+fp8 asks for two things at once; leave out +int8"),
        ({"compare": ("nothing", "b")}, "unknown checkpoint 'nothing'"),
        ({"context": LIMIT + 1}, f"--context {LIMIT + 1} is more than the {LIMIT} that "),
        ({"windows": 99}, "99 windows of 32 tokens need 3169 tokens and the text has 177"),
        (
            {"plot": Path("picture.gif")},
            "--plot picture.gif is no kind of picture that is written; end its name in .png",
        ),
        ({"plot": Path("nowhere/a.png")}, "--plot nowhere/a.png cannot be written: nowhere has to be a folder"),
    ],
)
def test_comparisons_that_cannot_be_are_refused_before_a_model_loads(compared, arguments, message, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **options: pytest.fail("began to work"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError) as error:
        evaluate.run_compare(replace(compared, **arguments))
    assert message in str(error.value)


def test_what_is_quantized_is_not_quantized_again(compared, directory, tmp_path, monkeypatch):
    source = open_checkpoint(str(directory))
    model = load_model(source, device="cpu", dtype=torch.float32, quantize="int8")
    save_model(model, tmp_path / "small", tokenizer=source.tokenizer, recipe=RECIPES["int8"])
    monkeypatch.setattr(checkpoint, "load_model", lambda *args, **options: pytest.fail("began to work"))
    with pytest.raises(ValueError, match=r"small is quantized already \(int8\)"):
        evaluate.run_compare(replace(compared, compare=(str(directory), f"{tmp_path / 'small'}+fp8")))


def test_models_of_other_tokens_are_not_compared(compared, directory, tiny_directory):
    with pytest.raises(ValueError, match=r"do not read the text as the same tokens; only models with the same"):
        evaluate.run_compare(replace(compared, compare=(str(directory), str(tiny_directory))))


def test_a_picture_is_drawn(compared, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate.run_compare(replace(compared, plot=tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_says_how_to_get_it(compared, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--plot needs matplotlib, which is not installed: pip install -e \.\[eval\]"):
        evaluate.run_compare(replace(compared, plot=Path("a.png")))


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
