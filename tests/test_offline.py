"""Prompts from a file of JSON lines: what is read, what is refused, and that answers are those of one prompt alone."""

import itertools
import json
from pathlib import Path

import pytest

import generate
from sampling import SamplingParams
from serving import offline
from serving.engine import Engine, EngineOptions
from serving.request import Output
from tests.fake_runner import VOCAB, FakeRunner
from tests.test_cli import environment, run, samples, tiny  # noqa: F401


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


# ---- Lines -----------------------------------------------------------------------------------------------------------


def test_lines_are_objects_or_strings_with_their_numbers(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '"a"', "", {"prompt": "b", "n": 2, "temperature": 1, "stop": ["."]})
    assert list(offline.read(path)) == [
        (1, {"prompt": "a"}),
        (3, {"prompt": "b", "n": 2, "temperature": 1, "stop": ["."]}),
    ]
    assert offline.check(path) == 2
    path.write_bytes(b"\xef\xbb\xbf" + '"ä"\r\n"b"'.encode())
    assert [fields["prompt"] for _, fields in offline.read(path)] == ["ä", "b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is not JSON: Expecting"),
        ("[1]", "line 2: it is neither"),
        ({}, "give a prompt or messages"),
        ({"prompt": "a", "messages": []}, "one of the two"),
        ({"prompt": 3}, "prompt must be text; got 3"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": [{"role": "user"}]}, "a message has a role"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "a message has a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message has a role"),
        ({"prompt": "a", "n": True}, "n must be a whole number; got True"),
        ({"prompt": "a", "n": 0}, "n must be at least 1; got 0"),
        ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens must be at least 1"),
        ({"prompt": "a", "top_k": 1.5}, "top_k must be a whole number"),
        ({"prompt": "a", "top_p": 2}, "top_p must be above 0"),
        ({"prompt": "a", "stop": [""]}, "stop must be a list of texts"),
        ({"prompt": "a", "tools": []}, "there is no field 'tools'; there are id, prompt"),
    ],
)
def test_a_line_that_is_wrong_is_refused_before_anything_runs(tmp_path: Path, line: object, message: str) -> None:
    path = written(tmp_path / "x.jsonl", '"fine"', line)
    with pytest.raises(ValueError, match=message):
        offline.check(path)


def test_a_file_without_prompts_or_of_other_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no prompt"):
        offline.check(written(tmp_path / "empty.jsonl", ""))
    (tmp_path / "bytes.jsonl").write_bytes(b'"a"\n\xff\n')
    with pytest.raises(ValueError, match="line 2, is not UTF-8"):
        offline.check(tmp_path / "bytes.jsonl")


# ---- The engine ------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: token i is a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % VOCAB for c in text]

    def stream(self, *, continues: bool) -> "Letters":
        return self

    def push(self, token: int) -> str:
        return chr(ord("0") + token)

    def finish(self) -> str:
        return ""


def jobs(*lines: dict, **defaults) -> list[offline.Job]:
    made = offline.Defaults(**{"params": SamplingParams(), "max_new_tokens": 5} | defaults)
    return [offline.make_job(number, line, made, Letters()) for number, line in enumerate(lines, 1)]


@pytest.fixture
def engine() -> Engine:
    return Engine(FakeRunner(max_running=3), options=EngineOptions(max_running=3, max_queued=0))


def test_every_job_is_done_with_few_in_the_engine_at_a_time(engine: Engine) -> None:
    lines = [{"prompt": "abc" * (i % 4 + 1), "max_new_tokens": 1 + i % 7, "n": 1 + i % 2} for i in range(20)]
    alone = [job.token_ids for line in lines for job in offline.run(engine, jobs(line), window=1)]
    most, turns = 0, 0

    def turned() -> None:
        nonlocal most, turns
        most, turns = max(most, len(engine._live)), turns + 1

    done = list(offline.run(engine, iter(jobs(*lines)), window=4, turned=turned))
    assert sorted(job.line for job in done) == list(range(1, 21))
    assert [job.token_ids for job in sorted(done, key=lambda job: job.line)] == alone
    assert most == 4 and turns > 5
    assert all(reason == "length" for job in done for reason in job.reasons)


def test_a_stop_string_ends_one_sample(engine: Engine) -> None:
    (whole,) = offline.run(engine, jobs({"prompt": "abc", "max_new_tokens": 9, "n": 2, "seed": 3}), window=1)
    stop = whole.texts[0].text[4:6]
    (job,) = offline.run(
        engine, jobs({"prompt": "abc", "max_new_tokens": 9, "n": 2, "seed": 3, "stop": [stop]}), window=1
    )
    assert job.texts[0].text == whole.texts[0].text[:4] and job.reasons[0] == "stop"
    assert job.texts[1].text == whole.texts[1].text.split(stop)[0]
    assert not engine.busy


@pytest.mark.parametrize(
    ("stop", "text"), [(["c"], "ab"), (["bcde", "d"], "abc"), (["bc", "cde"], "a"), (["x"], "abcdef")]
)
def test_tokens_that_come_together_are_taken_one_by_one(stop: list[str], text: str) -> None:
    letters, taken = [ord(letter) - ord("0") for letter in "abcdef"], []
    for sizes in ((1,) * 6, (1, 4, 1), (6,)):
        (job,) = jobs({"prompt": "x", "stop": stop})
        left = iter(letters)
        for size in sizes:
            job.take(Output("0", 0, list(itertools.islice(left, size))))
        taken.append(job.token_ids[0])
        assert job.texts[0].text == text and (job.reasons == ["stop"]) == (stop != ["x"])
    assert taken[0] == taken[1] == taken[2] == letters[: {"ab": 3, "abc": 4, "a": 3}.get(text, 6)]


def test_a_line_that_cannot_run_is_reported_and_the_others_go_on(engine: Engine) -> None:
    long = "a" * (engine.runner.max_seq_len + 1)
    done = list(offline.run(engine, jobs({"prompt": "a"}, {"prompt": long}, {"prompt": "", "id": "none"}), window=9))
    errors = {sample["line"]: sample for job in done for sample in job.samples if "error" in sample}
    assert errors.keys() == {2, 3} and all(sample["finish_reason"] == "error" for sample in errors.values())
    assert "tokens and a sequence holds" in errors[2]["error"] and errors[3]["id"] == "none"
    (job,) = jobs({"prompt": "abcdef"}, max_seq_len=6)
    assert "the prompt has 6 tokens and the context holds 6" in job.error
    (job,) = jobs({"prompt": "abc"}, max_seq_len=6)
    assert job.request.max_new_tokens == 3


def test_who_stops_early_leaves_an_idle_engine(engine: Engine) -> None:
    running = offline.run(engine, jobs(*[{"prompt": "abc", "max_new_tokens": 2 + 9 * i} for i in range(3)]), window=3)
    next(running)
    assert engine.busy
    running.close()
    assert not engine.busy and engine.scheduler.running == 0


# ---- The command line ------------------------------------------------------------------------------------------------


def test_a_file_of_lines_gives_the_answers_of_prompts_alone(tiny, run, tmp_path) -> None:  # noqa: F811
    prompts = ["The quick brown fox", "def main", "the"]
    alone = [samples(run(*tiny, "--prompt", p, "--max-new-tokens", 6, "--json"))[0] for p in prompts]
    written(tmp_path / "x.jsonl", *({"prompt": p} for p in prompts), {"prompt": ""})
    options = (*tiny, "--prompt-file", "x.jsonl", "--max-new-tokens", 6, "--batch-size", 2)
    document = json.loads(run(*options, "--json"))
    assert document["samples"][:3] == [{"line": n, **sample} for n, sample in enumerate(alone, 1)]
    assert document["samples"][3]["finish_reason"] == "error"
    assert document["stats"]["errors"] == 1 and document["stats"]["new_tokens"] == 18
    lines = [json.loads(line) for line in run(*options).splitlines()]
    assert sorted(lines, key=lambda sample: sample["line"]) == document["samples"]


def test_a_wrong_line_ends_before_the_model_is_loaded(tiny, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    monkeypatch.setattr(generate.checkpoint, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    written(tmp_path / "x.jsonl", {"prompt": 1})
    with pytest.raises(ValueError, match="line 1: prompt must be text"):
        generate.main([*tiny, "--prompt-file", "x.jsonl"])


@pytest.mark.parametrize("option", [["--echo"], ["--profile", "trace.json"]])
def test_what_the_engine_does_not_do_for_lines_is_refused(option: list[str], tmp_path) -> None:
    with pytest.raises(ValueError, match=f"without {option[0]}; leave it out"):
        generate.main(["--prompt-file", "x.jsonl", *option])
    assert not (tmp_path / "trace.json").exists()
