"""The command lines as a user runs them: what they print, the files they write, how they fail."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli
import generate
from checkpoint import open_checkpoint
from scripts import bench, download, evaluate
from tests.test_checkpoint import tiny_gguf

ROOT = Path(generate.__file__).parent
STATS = {
    "ttft_s",
    "decode_tok_s",
    "decode_gbs",
    "bandwidth_fraction",
    "compile_s",
    "load_s",
    "peak_memory_gb",
    "device",
    "dtype",
    "quantize",
    "kv_dtype",
}


@pytest.fixture(autouse=True)
def environment(cache_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command starts in another directory than the checkout, with a cache of its own and one thread."""
    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(tiny_directory: Path) -> tuple[str, ...]:
    """The tiny checkpoint in fp32 on the CPU, as options."""
    return "--checkpoint", str(tiny_directory), "--dtype", "float32", "--device", "cpu"


@pytest.fixture
def copy(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_directory, tmp_path / "copy"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """generate.py with these options, in this process; what it prints on stdout."""

    def run(*options: object) -> str:
        capsys.readouterr()
        cli.run(generate.main, [str(option) for option in options])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The one line with which a command line that cannot work ends."""

    def refused(*options: object, main: Callable[[list[str]], None] = generate.main) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(main, [str(option) for option in options])
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refused


def generate_py(*options: object, **settings) -> subprocess.CompletedProcess:
    """The real program, from a directory that is not the checkout's."""
    command = [sys.executable, ROOT / "generate.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **{"input": "", **settings})


def start(*options: object, **settings) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / "generate.py", *map(str, options)], **settings)


# ---- Text and JSON --------------------------------------------------------------------------------------------------


def test_the_program_streams_text_and_ends_with_its_figures(tiny, run) -> None:
    done = generate_py(*tiny, "--prompt", "The quick", "--max-new-tokens", "12")
    assert done.returncode == 0
    assert done.stdout == run(*tiny, "--prompt", "The quick", "--max-new-tokens", "12")
    assert done.stdout.count("\n") >= 1
    assert done.stderr.count("\n") == 1
    assert "12 new tokens at" in done.stderr
    assert re.search(r"[\d.]+ GB/s = \d+% of the 1000\.0 GB/s", done.stderr)


def samples(text: str) -> list[dict]:
    return json.loads(text)["samples"]


def test_json_is_one_document_with_everything_in_it(tiny, run, capsys) -> None:
    document = json.loads(run(*tiny, "--prompt", "The quick", "--max-new-tokens", 12, "--json"))
    assert document.keys() == {"samples", "stats"}
    (sample,) = document["samples"]
    assert sample.keys() == {"prompt_tokens", "token_ids", "text", "finish_reason"}
    assert (sample["prompt_tokens"], len(sample["token_ids"]), sample["finish_reason"]) == (2, 12, "length")
    assert document["stats"].keys() >= STATS
    assert document["stats"]["dtype"] == "float32"
    assert document["stats"]["quantize"] is None
    assert capsys.readouterr().err == ""
    text = run(*tiny, "--prompt", "The quick", "--max-new-tokens", 12)
    assert text == sample["text"] + "\n"


def test_json_goes_to_stdout_alone(tiny) -> None:
    done = generate_py(*tiny, "--prompt", "The quick", "--max-new-tokens", "3", "--json")
    assert json.loads(done.stdout)["samples"][0]["finish_reason"] == "length"
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_chat_puts_the_prompt_into_the_template(tiny, run, tiny_directory) -> None:
    tokenizer = open_checkpoint(str(tiny_directory)).tokenizer
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    for options, messages in (
        (["--chat"], [user]),
        (["--chat", "--system", "be brief"], [system, user]),
        (["--system", "be brief"], [system, user]),
    ):
        (sample,) = samples(run(*tiny, "--prompt", "hi", "--max-new-tokens", 2, "--json", *options))
        assert sample["prompt_tokens"] == len(tokenizer.chat(messages))
    assert samples(run(*tiny, "--prompt", "hi", "--max-new-tokens", 2, "--json"))[0]["prompt_tokens"] == len(
        tokenizer.encode("hi")
    )


def test_echo_prints_the_prompt_before_the_answer(tiny, run) -> None:
    plain = run(*tiny, "--prompt", "The quick", "--max-new-tokens", 5)
    assert run(*tiny, "--prompt", "The quick", "--max-new-tokens", 5, "--echo") == "The quick" + plain
    (sample,) = samples(run(*tiny, "--prompt", "The quick", "--max-new-tokens", 5, "--echo", "--json"))
    assert sample["text"] + "\n" == "The quick" + plain


def test_stop_ends_the_text_before_the_string(tiny, run) -> None:
    whole = run(*tiny, "--prompt", "The quick", "--max-new-tokens", 40).removesuffix("\n")
    stop = whole[len(whole) // 2 :][:4]
    options = (*tiny, "--prompt", "The quick", "--max-new-tokens", 40, "--stop", stop, "--stop", "\x00never")
    assert run(*options) == whole[: whole.index(stop)] + "\n"
    assert samples(run(*options, "--json"))[0]["finish_reason"] == "stop"


def test_the_checkpoints_eos_ids_end_an_answer_unless_ignored(tiny, copy, run) -> None:
    whole = samples(run(*tiny, "--prompt", "The quick", "--max-new-tokens", 20, "--json"))[0]["token_ids"]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [whole[7], 3]}))
    options = ("--checkpoint", copy, "--dtype", "float32", "--prompt", "The quick", "--max-new-tokens", 20, "--json")
    (sample,) = samples(run(*options))
    assert (sample["token_ids"], sample["finish_reason"]) == (whole[: whole.index(whole[7])], "stop")
    assert samples(run(*options, "--ignore-eos"))[0]["token_ids"] == whole


def test_samples_in_any_batch_size_are_the_same_and_repeatable(tiny, run) -> None:
    options = (*tiny, "--prompt", "The", "--temperature", "1", "--num-samples", 4, "--max-new-tokens", 9, "--json")
    first = samples(run(*options, "--seed", 7))
    assert len({sample["text"] for sample in first}) == 4
    for batch_size in (1, 3, 64):
        assert samples(run(*options, "--seed", 7, "--batch-size", batch_size)) == first
    assert samples(run(*options, "--seed", 8))[0] == first[1]  # seeds count up
    assert samples(run(*options)) != samples(run(*options))


def test_prompt_files_give_a_sample_for_each_prompt_in_order(tiny, run, tmp_path) -> None:
    prompts = ["The quick brown fox", "def main", "the"]
    alone = [samples(run(*tiny, "--prompt", p, "--max-new-tokens", 6, "--json"))[0] for p in prompts]
    (tmp_path / "lines").write_text("\n\n".join(prompts) + "\n")
    (tmp_path / "list").write_text(json.dumps(prompts))
    for file in ("lines", "list"):
        for batch_size in (1, 2, 3):
            options = (*tiny, "--prompt-file", file, "--max-new-tokens", 6, "--batch-size", batch_size)
            assert samples(run(*options, "--json")) == alone
            parts = re.split(r"^--- \d of 3\n", run(*options), flags=re.MULTILINE)
            assert parts == ["", *(sample["text"] + "\n" for sample in alone)]


def test_standard_input_is_a_prompt(tiny, run, monkeypatch) -> None:
    expected = run(*tiny, "--prompt", "The quick", "--max-new-tokens", 6)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The quick\n")))
    assert run(*tiny, "--max-new-tokens", 6) == expected


def test_the_context_bounds_the_answer(tiny, run) -> None:
    options = (*tiny, "--prompt", "The quick", "--max-seq-len", 10, "--json")
    (sample,) = samples(run(*options))
    assert (len(sample["token_ids"]), sample["finish_reason"]) == (8, "length")


def test_profile_writes_a_chrome_trace(tiny, run, tmp_path) -> None:
    run(*tiny, "--prompt", "The", "--max-new-tokens", 3, "--profile", "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any(event.get("name") == "aten::linear" for event in trace["traceEvents"])


def test_help_names_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate.main, ["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("checkpoint", "prompt-file", "interactive", "compile", "top-p", "min-p", "stop", "seed", "profile"):
        assert f"--{option}" in out


def test_compile_gives_the_same_text(tiny, run) -> None:
    options = (*tiny, "--prompt", "The quick brown", "--max-new-tokens", "12")
    done = generate_py(*options, "--compile")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(*options)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_kv_dtype_stores_the_cache_and_says_so(kv_dtype, tiny, run, capsys) -> None:
    options = (*tiny, "--prompt", "The quick brown", "--max-new-tokens", 6, "--kv-dtype", kv_dtype)
    plain, document = (json.loads(run(*some, "--json")) for some in (options[:-2], options))
    assert (plain["stats"]["kv_dtype"], document["stats"]["kv_dtype"]) == (None, kv_dtype)
    assert document["stats"]["dtype"] == "float32"
    assert len(document["samples"][0]["token_ids"]) == 6
    cli.run(generate.main, [*map(str, options), "--quantize", "int8"])
    assert f"; int8 weights, {kv_dtype} cache, else float32 on" in capsys.readouterr().err


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_quantize_rounds_the_weights_and_says_so(quantize, tiny, run, capsys) -> None:
    options = (*tiny, "--prompt", "The quick brown", "--max-new-tokens", 6, "--quantize", quantize)
    document = json.loads(run(*options, "--json"))
    assert document["stats"]["quantize"] == quantize
    assert document["stats"]["dtype"] == "float32"
    assert len(document["samples"][0]["token_ids"]) == 6
    cli.run(generate.main, list(map(str, options)))
    assert f"; {quantize} weights, else float32 on" in capsys.readouterr().err


# ---- Signals and pipes ----------------------------------------------------------------------------------------------

LONG = ("--prompt", "The", "--ignore-eos", "--max-new-tokens", "4000")


def test_ctrl_c_ends_the_program_with_130(tiny) -> None:
    program = start(*tiny, *LONG, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    program.stdout.read(1)  # it has begun to answer
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert err.decode().strip() == ""


@pytest.mark.parametrize("options", [(), ("--json", "--max-new-tokens", "3")])
def test_a_reader_that_leaves_is_no_error(tiny, options) -> None:
    program = start(*tiny, *LONG, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not options:
        program.stdout.read(1)
    program.stdout.close()
    err = program.stderr.read().decode()
    program.stderr.close()
    assert program.wait(timeout=60) == 141
    assert err == ""


# ---- Chat -----------------------------------------------------------------------------------------------------------


def test_interactive_reads_a_pipe_to_its_end(tiny) -> None:
    lines = "hello there\nand now\n/stats\n/save one.json\n/reset\nhello there\n/save two.json\n/nonsense\n/exit\nno\n"
    done = generate_py(*tiny, "--interactive", "--system", "be brief", "--max-new-tokens", 5, input=lines)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert [m["role"] for m in one] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in one if m["role"] == "user"] == ["hello there", "and now"]
    assert two == one[:3]  # from a fresh start, over another conversation's cache, the answer is the same
    assert done.stdout == "".join(f"{m['content']}\n" for m in [one[2], one[4], two[2]])
    assert "10 new tokens at" in done.stderr
    assert done.stderr.count("/reset forgets") == 2  # at the start and for the unknown command
    assert "Traceback" not in done.stderr


def test_interactive_answers_are_those_of_the_chat_template(tiny, run, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    chat = run(*tiny, "--interactive", "--max-new-tokens", 9)
    assert chat == run(*tiny, "--chat", "--prompt", "hi", "--max-new-tokens", 9)


def test_a_conversation_that_outgrows_the_context_goes_on_after_reset(tiny, monkeypatch, capsys) -> None:
    lines = ["hi", "word " * 300, "/save kept.json", "/reset", "hi", "/save /no/such/folder/x", "/save"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    cli.run(generate.main, [*tiny, "--interactive", "--max-new-tokens", "4", "--max-seq-len", "100"])
    out, err = capsys.readouterr()
    assert re.search(r"error: the prompt has \d+ tokens and the context holds 100, .*/reset starts anew\n", err)
    assert "/no/such/folder/x" in err
    assert "/save needs a file name" in err
    kept = json.loads(Path("kept.json").read_text())
    assert len(kept) == 2
    assert out == 2 * (kept[1]["content"] + "\n")


class Terminal:
    """A program on a pseudo-terminal, driven by keys."""

    def __init__(self, *options: object) -> None:
        self.screen, child = pty.openpty()
        self.program = start(
            *options,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that keys make signals
        )
        os.close(child)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until `text` is shown: readline misses one that comes just before it waits for a key."""
        for _ in range(10):
            self.press("\x03")
            if select.select([self.screen], [], [], 2.0)[0]:
                break
        self.wait_for(text)

    def wait_for(self, text: str, *, seconds: float = 60) -> str:
        """Read until `text` is shown; what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; the screen shows {self.shown[-2000:]!r}"
            self.shown += os.read(self.screen, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def close(self) -> int:
        try:
            return self.program.wait(timeout=30)
        finally:
            self.program.kill()
            os.close(self.screen)


def test_a_terminal_streams_stops_at_ctrl_c_and_leaves_at_ctrl_d(tiny, tmp_path) -> None:
    terminal = Terminal(*tiny, "--interactive", "--ignore-eos", "--max-new-tokens", 3900)
    terminal.wait_for("> ")
    terminal.press("hi\n")
    terminal.wait_for("hi\r\n")
    while len(terminal.shown) < 40:  # the answer streams ...
        terminal.shown += os.read(terminal.screen, 65536).decode(errors="replace")
    terminal.press("\x03")
    terminal.wait_for("\r\n> ")  # ... and ends, but not the program
    terminal.press("/save said.json\n")
    terminal.wait_for("> ")
    terminal.press("/stats\n")
    stats = terminal.wait_for("tok/s")
    terminal.wait_for("> ")
    terminal.press("typed")
    terminal.wait_for("typed")
    terminal.interrupt("> ")  # at the prompt it drops the line
    terminal.press("\x04")
    assert terminal.close() == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert [m["role"] for m in said] == ["user", "assistant"]
    assert len(said[1]["content"]) > 20
    assert 0 < int(re.search(r"(\d+) new tokens", stats)[1]) < 3900


# ---- Bad input ------------------------------------------------------------------------------------------------------


def test_paths_and_names_that_do_not_exist(refused, tmp_path) -> None:
    for path in (tmp_path / "no" / "such", tmp_path / "model.gguf", "./here"):
        assert f"no such file or directory: {path}" in refused("--checkpoint", path, "--prompt", "a")
    for name in ("llama", ""):
        message = refused("--checkpoint", name, "--prompt", "a")
        assert f"unknown checkpoint {name!r}" in message
        assert "smollm2-135m" in message


def test_a_directory_without_config(refused, copy) -> None:
    (copy / "config.json").unlink()
    assert f"{copy} has no config.json; give a directory in Hugging Face layout" in refused("--checkpoint", copy)


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_architecture_lists_the_supported(refused, copy) -> None:
    edit_config(copy, architectures=["GPT2LMHeadModel"])
    message = refused("--checkpoint", copy, "--prompt", "a")
    for name in ("'GPT2LMHeadModel'", "LlamaForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM"):
        assert name in message


def test_a_missing_shard_is_named(refused, copy) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused("--checkpoint", copy, "--prompt", "a")
    assert "model-00002-of-00002.safetensors is missing" in message
    assert "download it again" in message


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_shard_is_named(refused, copy, keep) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refused("--checkpoint", copy, "--prompt", "a")
    assert f"{path} is truncated or damaged" in message
    assert "download it again" in message


def test_a_shape_mismatch_names_the_tensor_and_both_shapes(refused, copy) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 79)
    save_file(tensors, path)
    message = refused("--checkpoint", copy, "--prompt", "a")
    assert "model.layers.1.mlp.down_proj.weight has shape [48, 79], but the config asks for [48, 80]" in message


def test_pickles_are_refused(refused, copy, tmp_path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (tmp_path / "model.pth").write_bytes(b"PK")
    for path, name in ((copy, "pytorch_model.bin"), (tmp_path / "model.pth", "model.pth")):
        message = refused("--checkpoint", path, "--prompt", "a")
        assert name in message
        assert "pickle" in message
        assert "convert it to safetensors" in message


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_gguf_that_is_cut_short_is_named(refused, tmp_path, part) -> None:
    path = tiny_gguf(tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    message = refused("--checkpoint", path, "--prompt", "a")
    assert str(path) in message


def test_a_gguf_runs(run, tmp_path) -> None:
    path = tiny_gguf(tmp_path / "model.gguf")
    (sample,) = samples(run("--checkpoint", path, "--prompt", "ab", "--max-new-tokens", 3, "--ignore-eos", "--json"))
    assert len(sample["token_ids"]) == 3


def test_an_unreachable_hub_names_the_built_in(tmp_path) -> None:
    unreachable = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    done = generate_py("--checkpoint", "org/name", "--prompt", "a", env=unreachable)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: cannot get org/name from the Hugging Face Hub")
    assert "smollm2-135m" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_prompt_longer_than_the_context_says_both_lengths(refused, tiny) -> None:
    message = refused(*tiny, "--prompt", "the " * 5000)
    assert re.search(r"the prompt has 500\d tokens and the context holds 4096", message)
    assert "shorten the prompt" in message
    assert "the context holds 2," in refused(*tiny, "--prompt", "the the", "--max-seq-len", 2)
    message = refused(*tiny, "--prompt", "the", "--max-seq-len", 4097)
    assert "--max-seq-len 4097 is more than the 4096 that" in message


def test_prompts_that_are_empty(refused, tiny, tmp_path, monkeypatch) -> None:
    (tmp_path / "empty").write_text("\n")
    assert "empty has no prompt: write one a line" in refused(*tiny, "--prompt-file", tmp_path / "empty")
    assert "the prompt is empty" in refused(*tiny, "--prompt", "")
    assert "missing" in refused(*tiny, "--prompt-file", tmp_path / "missing")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "no prompt: give --prompt TEXT" in refused(*tiny)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--top-p", "1.5"), ("top_p", "at most 1", "1.5")),
        (("--top-p", "0"), ("top_p", "above 0", "0.0")),
        (("--temperature", "-1"), ("temperature", "between 0", "-1.0")),
        (("--temperature", "nan"), ("temperature", "nan")),
        (("--top-k", "-3"), ("top_k", "-3")),
        (("--min-p", "2"), ("min_p", "2.0")),
        (("--repetition-penalty", "0"), ("repetition_penalty", "0.0")),
        (("--max-new-tokens", "0"), ("--max-new-tokens", "got 0")),
        (("--stop", ""), ("--stop",)),
        (("--prompt-file", "x"), ("--prompt or --prompt-file, not both",)),
        (("--interactive",), ("--interactive", "leave out --prompt")),
        (("--device", "warp"), ("'warp'", "cpu, cuda, cuda:N or mps")),
        (("--quantize", "int3"), ("--quantize", "'int3'", "int8", "int4", "fp8")),
        (("--kv-dtype", "int4"), ("--kv-dtype", "'int4'", "int8", "fp8")),
    ],
)
def test_options_out_of_range(refused, tiny, options, words) -> None:
    message = refused(*tiny, "--prompt", "a", *options)
    for word in words:
        assert word in message


def test_cuda_without_cuda(refused, tiny, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3"):
        message = refused(*tiny, "--prompt", "a", "--device", name)
        assert f"--device {name}" in message
        assert "0 CUDA devices; use --device cpu" in message


def test_an_unwritable_cache_is_named(refused, tmp_path, monkeypatch, tiny) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TACHYON_CACHE", str(tmp_path / "file" / "cache"))
    for options in (("--checkpoint", "smollm2-135m"), (*tiny, "--compile"), (*tiny, "--json")):
        message = refused(*options, "--prompt", "a")
        assert f"cannot write to the cache {tmp_path}/file/cache" in message
        assert "set TACHYON_CACHE" in message


def test_an_unwritable_cache_is_found_before_the_answer(refused, tmp_path, monkeypatch, tiny) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TACHYON_CACHE", str(tmp_path / "file" / "cache"))
    refused(*tiny, "--prompt", "a", "--max-new-tokens", 3)


def test_a_profile_that_cannot_be_written_is_an_error(refused, tiny, tmp_path) -> None:
    message = refused(*tiny, "--prompt", "a", "--max-new-tokens", 3, "--profile", tmp_path / "no" / "trace.json")
    assert str(tmp_path / "no") in message


def test_unknown_presets_list_the_known(refused) -> None:
    message = refused("--checkpoint", "random:gpt-5", "--prompt", "a")
    for name in ("'gpt-5'", "llama-2-7b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b", "smollm2-135m"):
        assert name in message


def test_a_template_that_reaches_for_python_is_refused(refused, copy) -> None:
    (copy / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    message = refused("--checkpoint", copy, "--prompt", "a", "--chat")
    assert "chat template refused" in message
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    assert "this checkpoint has no chat template" in refused("--checkpoint", copy, "--prompt", "a", "--chat")


def test_a_checkpoint_without_a_tokenizer(refused, copy) -> None:
    (copy / "tokenizer.json").unlink()
    assert f"no tokenizer.json and no tokenizer.model in {copy}" in refused("--checkpoint", copy, "--prompt", "a")
    assert "has no tokenizer" in refused("--checkpoint", f"random:{copy}/config.json", "--prompt", "a")


def test_bad_input_of_the_real_program_shows_no_traceback(tiny) -> None:
    done = generate_py(*tiny, "--prompt", "a", "--top-p", "1.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: top_p must be above 0 and at most 1, where 1 is off; got 1.5\n"


def test_an_unknown_option_is_exit_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(generate.main, ["--promt", "a", "--dtype", "int3"])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err


def test_messages_of_several_lines_become_one(capsys) -> None:
    def fails(arguments: list[str]) -> None:
        raise ValueError("first\n  second\n")

    with pytest.raises(SystemExit):
        cli.run(fails, [])
    assert capsys.readouterr().err == "error: first second\n"


# ---- Scripts --------------------------------------------------------------------------------------------------------


def test_bench_prints_one_json_document(tiny_directory, capsys) -> None:
    options = ["--checkpoint", str(tiny_directory), "--device", "cpu", "--prompt-len", "6", "--new-tokens", "5"]
    cli.run(bench.main, [*options, "--batch", "2", "--repeats", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= STATS | {"ms_per_token", "prompt_len", "new_tokens", "batch", "compile"}
    assert result["ms_per_token"] == pytest.approx(2000 / result["decode_tok_s"])
    cli.run(bench.main, [*options, "--repeats", "1"])
    assert "ms" in capsys.readouterr().out


def test_bench_repeats_its_options(tiny_directory, capsys) -> None:
    options = ["--checkpoint", str(tiny_directory), "--device", "cpu", "--prompt-len", "6", "--new-tokens", "5"]
    cli.run(bench.main, [*options, "--batch", "2", "--repeats", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt_len"], result["new_tokens"], result["batch"], result["repeats"]) == (6, 5, 2, 1)


def test_bench_runs_as_a_module_on_random_weights(tiny_directory) -> None:
    options = ["--checkpoint", f"random:{tiny_directory}/config.json", "--repeats", "1", "--new-tokens", "4", "--json"]
    command = [sys.executable, "-m", "scripts.bench", *options, "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decode_tok_s"] > 0


def test_bench_and_evaluate_store_the_cache_as_generate_does(tiny_directory, capsys, tmp_path) -> None:
    options = ["--checkpoint", str(tiny_directory), "--device", "cpu", "--dtype", "float32"]
    cli.run(bench.main, [*options, "--new-tokens", "3", "--repeats", "1", "--kv-dtype", "int8"])
    assert ", int8 cache, else float32 on" in capsys.readouterr().out
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    nll = []
    for more in ([], ["--kv-dtype", "int8"], ["--kv-dtype", "fp8"]):
        cli.run(evaluate.main, [*options, *more, "--text", "text", "--context", "32", "--windows", "1", "--json"])
        result = json.loads(capsys.readouterr().out)
        assert result["kv_dtype"] == (more[1] if more else None)
        nll.append(result["nll"])
    plain, int8, fp8 = nll
    assert 0 < abs(int8 - plain) < abs(fp8 - plain) < 0.02 * plain


def test_bench_and_evaluate_quantize_as_generate_does(tiny_directory, capsys, tmp_path) -> None:
    options = ["--checkpoint", str(tiny_directory), "--device", "cpu", "--quantize", "int8"]
    cli.run(bench.main, [*options, "--new-tokens", "3", "--repeats", "1", "--json"])
    assert json.loads(capsys.readouterr().out)["quantize"] == "int8"
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    results = []
    for more in ([], ["--quantize", "int8"]):
        cli.run(evaluate.main, [*options[:4], *more, "--text", "text", "--context", "32", "--windows", "1", "--json"])
        results.append(json.loads(capsys.readouterr().out))
    assert [result["quantize"] for result in results] == [None, "int8"]
    assert results[0]["nll"] != results[1]["nll"] == pytest.approx(results[0]["nll"], rel=0.05)
    cli.run(bench.main, [*options, "--new-tokens", "3", "--repeats", "1"])
    assert "int8 weights, else bfloat16 on" in capsys.readouterr().out


def test_bench_refuses_what_does_not_fit(refused, tiny_directory) -> None:
    options = ("--checkpoint", tiny_directory, "--device", "cpu")
    assert "--repeats must be at least 1; got 0" in refused(*options, "--repeats", 0, main=bench.main)
    message = refused(*options, "--prompt-len", 4000, "--new-tokens", 200, main=bench.main)
    assert "4200" in message
    assert "4096" in message


def test_download_of_a_directory_says_where_it_is(tiny_directory, capsys, refused) -> None:
    cli.run(download.main, [str(tiny_directory)])
    assert capsys.readouterr().out == f"{tiny_directory.resolve()}\n"
    cli.run(download.main, [str(tiny_directory), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["bytes"] == sum(file.stat().st_size for file in tiny_directory.iterdir())
    assert "no such file or directory" in refused("/no/such/place", main=download.main)


# ---- The package ----------------------------------------------------------------------------------------------------


def test_a_wheel_contains_every_module(tmp_path) -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    modules = {name for name in listed.stdout.split() if not name.startswith("tests/")}
    source = tmp_path / "source"  # building leaves files beside the sources
    data = {"kernels/tuned.json", "serving/page.html"}
    for name in (*modules, *data, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("tachyon-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == modules | data
