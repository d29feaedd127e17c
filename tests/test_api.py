"""The HTTP API over a fake engine, by real connections; what a real one gives is in test_serve.py."""

import contextlib
import dataclasses
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import ValidationError

from serving import protocol
from serving.api import OPENAI_SAMPLING, ServerOptions
from serving.engine import EngineStats
from serving.replies import Reply
from serving.request import Request
from tests.fake_engine import Live, request_bytes, serve
from tokenizer import Tokenizer, load_tokenizer

TEXT = "hello there, naïve 你好 world"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Live]:
    def script(request: Request, index: int) -> Sequence[int]:
        text = tokenizer.decode(request.prompt)
        return tokenizer.encode("go on " * 400 if "forever" in text else TEXT + "!" * index)

    with serve(tokenizer, script, max_answers=8, max_body_mb=0.05) as server:
        yield server


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    """The shared server, with nothing left of the test before."""
    engine = shared.engine
    engine.turn_s, engine.broken, engine.broken_reason, engine.max_requests = 0.0, None, "error", 10**6
    engine.requests.clear()
    engine.aborted.clear()
    engine.held.clear()
    yield shared
    engine.held.clear()
    shared.wait(lambda: not engine.live and not shared.service.replies)


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def post(live: Live, body: object, path: str = "/v1/completions", **kwargs) -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=20, **kwargs)


def message_of(response: httpx.Response) -> str:
    """The message of an error object, whose shape is checked on the way."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["message"]


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_a_chat_answers_with_text_usage_and_reason(client: openai.OpenAI, live: Live, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.object == "chat.completion" and answer.model == "fake" and answer.id.startswith("chatcmpl-")
    prompt = tokenizer.chat(USER)
    assert answer.usage.prompt_tokens == len(prompt) == len(live.engine.requests[0].prompt)
    assert answer.usage.completion_tokens == len(tokenizer.encode(TEXT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_a_streamed_chat_joins_to_the_same_text(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    *events, last = client.chat.completions.create(model="fake", messages=USER, stream=True, stream_options=options)
    assert "".join(event.choices[0].delta.content for event in events) == TEXT
    assert [event.choices[0].delta.role for event in events] == ["assistant"] + [None] * (len(events) - 1)
    assert [event.choices[0].finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert all(event.usage is None for event in events)
    assert last.choices == [] and last.usage.completion_tokens > 1
    events = list(client.chat.completions.create(model="fake", messages=USER, stream=True))
    assert all(event.choices and event.usage is None for event in events)


def test_a_stream_is_sent_token_by_token_and_ends_with_done(live: Live) -> None:
    body = {"prompt": "a", "stream": True, "max_tokens": 2}
    with httpx.stream("POST", live.url + "/v1/completions", json=body, timeout=20) as response:
        assert response.headers["content-type"] == "text/event-stream"
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) == 3
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


def test_every_prompt_and_sample_is_a_choice(client: openai.OpenAI, live: Live, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="fake", prompt=["one", "two"], n=3, max_tokens=200, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [TEXT, TEXT + "!", TEXT + "!!"] * 2
    assert [(r.prompt, r.n, r.params.seed) for r in live.engine.requests] == [
        (tokenizer.encode("one"), 3, 5),
        (tokenizer.encode("two"), 3, 5),
    ]
    stream = client.completions.create(model="fake", prompt=["one", "two"], n=3, max_tokens=200, stream=True)
    texts = [""] * 6
    for event in stream:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_prompts_are_text_or_tokens_and_may_be_echoed(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two")
    for prompt in ("one two", ids, ["one two"], [ids]):
        answer = client.completions.create(model="fake", prompt=prompt, echo=True, max_tokens=1)
        assert answer.choices[0].text.startswith("one two")
        assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens) == ("length", len(ids))
        events = list(client.completions.create(model="fake", prompt=prompt, echo=True, max_tokens=3, stream=True))
        assert sum("one two" in event.choices[0].text for event in events) == 1


def test_lengths_have_the_official_defaults(client: openai.OpenAI, live: Live) -> None:
    client.completions.create(model="fake", prompt="one")
    client.chat.completions.create(model="fake", messages=USER)
    client.chat.completions.create(model="fake", messages=USER, max_completion_tokens=7)
    client.chat.completions.create(model="fake", messages=USER, max_tokens=8)
    prompts = [len(r.prompt) for r in live.engine.requests]
    assert [r.max_new_tokens for r in live.engine.requests] == [16, 4096 - prompts[1], 7, 8]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_its_sample_alone_and_is_not_shown(client: openai.OpenAI, live: Live, stream: bool) -> None:
    answer = client.completions.create(
        model="fake", prompt="go forever", n=2, stop=["on g", "zzz"], max_tokens=900, stream=stream
    )
    if stream:
        texts, reasons = ["", ""], [None, None]
        for event in answer:
            (choice,) = event.choices
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    else:
        texts = [choice.text for choice in answer.choices]
        reasons = [choice.finish_reason for choice in answer.choices]
    assert texts == ["go ", "go "] and reasons == ["stop", "stop"]
    (request,) = live.engine.requests
    assert {(request.id, 0), (request.id, 1)} <= set(live.engine.aborted)


def test_tokens_that_come_together_are_taken_one_by_one(client: openai.OpenAI, live: Live) -> None:
    """So the stop string that is complete first ends the answer, and none after it counts."""
    found = []
    for live.engine.burst in (1, 5):
        for stop in ("on g", ["go on go", "n"], "zzz"):
            answer = client.completions.create(model="fake", prompt="go forever", stop=stop, max_tokens=30)
            found.append((answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens))
    live.engine.burst = 1
    assert found[:3] == found[3:] and {reason for _, reason, _ in found} == {"stop", "length"}


def test_stop_strings_and_half_characters_are_held_back(client: openai.OpenAI) -> None:
    """What may become a stop string is not sent, and is once it cannot any more."""
    events = list(client.completions.create(model="fake", prompt="a", stop="here!", max_tokens=99, stream=True))
    text = "".join(event.choices[0].text for event in events)
    assert text == TEXT and "\ufffd" not in text
    shown = ""
    for event in events:
        shown += event.choices[0].text
        assert not any(shown.endswith("here!"[:n]) for n in range(1, 5)) or shown == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_cover_the_text(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=USER, logprobs=True, top_logprobs=2, stop="world", stream=stream
    )
    if stream:
        choices = [event.choices[0] for event in answer]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    else:
        entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text in ("hello there, naïve 你好 ", "hello there, naïve 你好 w")  # the space may be in a token with the w
    assert all(entry.logprob == -0.5 and [t.logprob for t in entry.top_logprobs] == [-0.5, -1.5] for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_have_offsets(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    answer = client.completions.create(model="fake", prompt="a", logprobs=1, max_tokens=99, stream=stream)
    pages = [event.choices[0].logprobs for event in answer] if stream else [answer.choices[0].logprobs]
    tokens = [token for page in pages if page for token in page.tokens]
    offsets = [offset for page in pages if page for offset in page.text_offset]
    assert len(tokens) == len(tokenizer.encode(TEXT))
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] < len(TEXT)
    assert [value for page in pages if page for value in page.token_logprobs] == [-0.5] * len(tokens)
    assert all(len(top) == 1 for page in pages if page for top in page.top_logprobs)


def test_every_sampling_parameter_reaches_the_engine(live: Live) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "seed": -3,
    }
    more = {"priority": -2, "cache_salt": "mine", "logit_bias": {"5": -100, "6": 2.5}, "stop_token_ids": [9]}
    assert post(live, {"prompt": "a", "user": "me", "n": 2} | fields | more).status_code == 200
    (request,) = live.engine.requests
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert (request.priority, request.salt, request.logit_bias, request.n) == (-2, "mine", {5: -100.0, 6: 2.5}, 2)
    assert request.stop_ids == {9, *live.service.eos_ids}
    assert post(live, {"prompt": "a", "ignore_eos": True, "top_k": -1}).status_code == 200
    assert live.engine.requests[1].stop_ids == frozenset() and live.engine.requests[1].params.top_k == 0


def test_a_request_without_a_seed_draws_another_each_time_at_temperature_1(live: Live) -> None:
    for _ in range(2):
        post(live, {"prompt": "a", "temperature": None, "seed": None})
    first, second = (request.params for request in live.engine.requests)
    assert first.temperature == second.temperature == 1.0 and first.seed != second.seed


def test_what_a_request_leaves_open_is_the_models(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tachyon")
    options, own = ServerOptions(), {"temperature": 0.6, "top_k": 20}
    sampling = options.sampling(own)
    assert "temperature 0.6, top_k 20" in caplog.text
    with serve(tokenizer, lambda request, index: [1], sampling=sampling) as live:
        for body in ({}, {"temperature": None, "top_p": 0.5}, {"temperature": 0.0, "top_k": -1}):
            assert post(live, {"prompt": "a"} | body).status_code == 200
        drawn = [(r.params.temperature, r.params.top_k, r.params.top_p) for r in live.engine.requests]
    assert drawn == [(0.6, 20, 1.0), (0.6, 20, 0.5), (0.0, 0, 1.0)]
    assert ServerOptions(sampling_defaults="openai").sampling(own) == options.sampling({}) == OPENAI_SAMPLING
    for bad in ({"top_p": 1.5}, {"temperature": "hot"}):
        with pytest.raises(ValueError, match=r"generation_config\.json: .*--sampling-defaults openai"):
            options.sampling(bad)


def test_a_json_schema_holds_the_answer(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="fake",
        messages=USER,
        n=2,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert [json.loads(choice.message.content) for choice in answer.choices] == [{"a": "b"}] * 2
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "field",
    [
        {"guided_regex": "a{3}"},
        {"structured_outputs": {"regex": "a{3}"}},
        {"structured_outputs": {"choice": ["aaa"]}},
        {"guided_grammar": 'start: "aa" "a"'},
        {"structured_outputs": {"grammar": "start: /a{3}/"}},
    ],
)
def test_a_grammar_holds_the_answer(live: Live, field: dict) -> None:
    assert post(live, {"prompt": "a"} | field).json()["choices"][0]["text"] == "aaa"


# ---- Refusals -------------------------------------------------------------------------------------------------------

CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"tools": [{"type": "function"}]}, "tools is not supported"),
        (CHAT, {"functions": [{}]}, "functions is not supported"),
        (CHAT, {"audio": {"voice": "x"}}, "audio is not supported"),
        (CHAT, {"temprature": 1}, "temprature is not supported"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages.0.tool_calls is not"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs goes with logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        (CHAT, {"chat_template_kwargs": {"messages": 1}}, "not the template's own"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "json_schema"),
        (CHAT, {"response_format": {"type": "json_object"}, "guided_regex": "a"}, "one of"),
        (TEXTS, {"best_of": 2}, "best_of is not supported"),
        (TEXTS, {"suffix": "x"}, "suffix is not supported"),
        (TEXTS, {"echo": True, "logprobs": 1}, "echo does not go with logprobs"),
        (TEXTS, {"n": 0}, "n: "),
        (TEXTS, {"n": 9}, "1 to 8 answers"),
        (TEXTS, {"n": 1.5}, "n: "),
        (TEXTS, {"temperature": -0.1}, "temperature: "),
        (TEXTS, {"temperature": "1"}, "temperature: "),
        (TEXTS, {"top_p": 0}, "top_p: "),
        (TEXTS, {"seed": 2**64}, "seed: "),
        (TEXTS, {"max_tokens": 0}, "max_tokens: "),
        (TEXTS, {"max_tokens": 5000}, "5000 more are asked for; the context holds 4096"),
        (TEXTS, {"stop": [""]}, "must not be empty"),
        (TEXTS, {"stop": ["a"] * 17}, "at most 16"),
        (TEXTS, {"stop": "a" * 1025}, "of 1024 characters"),
        (TEXTS, {"logit_bias": {"a": 1}}, "not a token id"),
        (TEXTS, {"logit_bias": {"9" * 5000: 1}}, "not a token id"),
        (TEXTS, {"logit_bias": {str(i): 1 for i in range(1025)}}, "at most 1024"),
        (TEXTS, {"cache_salt": "a" * 257}, "cache_salt: "),
        (TEXTS, {"temperature": 1e39}, "temperature: "),
        (TEXTS, {"repetition_penalty": 1e-39}, "repetition_penalty: "),
        (CHAT, {f"field{i}": 0 for i in range(99)}, "at most 64 fields"),
        (TEXTS, {"logit_bias": {"1": 101}}, "between -100 and 100"),
        (TEXTS, {"logit_bias": {"100000": 1}}, "not one of the"),
        (TEXTS, {"stop_token_ids": [-1]}, "not one of the"),
        (TEXTS, {"stream_options": {"include_usage": True}}, "stream_options goes with stream"),
        (TEXTS, {"prompt": ""}, "the prompt is empty"),
        (TEXTS, {"prompt": []}, "the prompt is empty"),
        (TEXTS, {"prompt": [[]]}, "the prompt is empty"),
        (TEXTS, {"prompt": [1, "a"]}, "prompt: "),
        (TEXTS, {"prompt": [[1, "a"]]}, "prompt[0][1]: "),
        (CHAT, {"messages": [*USER, {"role": "user"}]}, "messages[1].content: Field required"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (TEXTS, {"prompt": [10**9]}, "not one of the"),
        (TEXTS, {"prompt": [1] * 4096}, "the prompt has 4096 tokens"),
        (TEXTS, {"prompt": None}, "prompt: "),
        (TEXTS, {"guided_regex": "("}, "the regex is refused"),
        (TEXTS, {"structured_outputs": {}}, "structured_outputs needs"),
        (TEXTS, {"prompt": [999, 1]}, "can never fit"),
    ],
)
def test_what_is_not_supported_or_wrong_is_refused_by_name(live: Live, path: str, fields: dict, words: str) -> None:
    body = {"messages": USER} if path == CHAT else {"prompt": "a"}
    if fields.get("prompt") == [999, 1]:
        live.service.vocab_size = max(live.service.vocab_size, 1000)
    response = post(live, body | fields, path)
    assert response.status_code == 400 and words in message_of(response)
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [0] * 9999 + ["x"]},
        {"prompt": [[0] * 9999 + ["x"]]},
        {"prompt": "a", "stop": [0] * 9999},
        {"prompt": "a", "stop_token_ids": ["x"] * 9999},
        {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(9999)), "x")},
        {"prompt": "a", **dict.fromkeys(map(str, range(9999)), 0)},
    ],
)
def test_a_thousand_mistakes_cost_what_one_does(body: dict) -> None:
    with pytest.raises(ValidationError) as caught:
        protocol.CompletionRequest.model_validate(body)
    assert caught.value.error_count() < 10


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    nothing = {"tools": [], "store": False, "service_tier": "auto", "modalities": ["text"], "metadata": None}
    reply = client.chat.completions.create(model="fake", messages=USER).choices[0].message.model_dump()
    again = client.chat.completions.create(
        model="fake", messages=[*USER, reply, *USER], response_format={"type": "text"}, extra_body=nothing
    )
    assert again.choices[0].message.content == TEXT


def test_errors_are_the_official_clients(client: openai.OpenAI, live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'other'") as caught:
        client.chat.completions.create(model="other", messages=USER)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="a", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    live.engine.max_requests = 0
    with pytest.raises(openai.RateLimitError, match="too many") as caught:
        client.completions.create(model="fake", prompt="a")
    assert caught.value.response.headers["retry-after"] == "3"
    live.engine.max_requests = 10
    live.engine.broken = "step 10 failed: out of luck"
    with pytest.raises(openai.InternalServerError, match="out of luck") as caught:
        client.completions.create(model="fake", prompt="a")
    with pytest.raises(openai.InternalServerError, match="out of luck"):
        list(client.completions.create(model="fake", prompt="a", stream=True))


def test_an_error_in_the_middle_of_a_stream_is_an_event_of_it(client: openai.OpenAI, live: Live) -> None:
    live.engine.turn_s = 0.005
    stream = client.completions.create(model="fake", prompt="forever", max_tokens=900, stream=True)
    next(stream)
    live.engine.broken = "step 10 failed"
    with pytest.raises(openai.APIError, match="step 10 failed"):
        list(stream)


def test_a_second_prompt_that_is_refused_takes_the_first_back(live: Live) -> None:
    live.engine.held.set()
    live.engine.max_requests = 1
    assert post(live, {"prompt": ["a", "b"]}).status_code == 429
    assert not live.engine.live


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"", 400, ""),
        (b"[]", 400, ""),
        (b'"a"', 400, ""),
        (b"\xff\xfe", 400, ""),
        (b'{"prompt": "\xff"}', 400, ""),
        (b'{"prompt": NaN}', 400, "prompt"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b"[" * 40000, 400, ""),
        (b'{"prompt": "' + b"a" * 60000 + b'"}', 413, "larger than 50000 bytes"),
        (b'{"prompt": "\\ud800", "echo": true}', 200, ""),
        (b'{"prompt": "a\\u0000b"}', 200, ""),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_malformed_and_huge_bodies(live: Live, data: bytes, status: int, words: str, chunked: bool) -> None:
    content = iter([data[:7], data[7:]]) if chunked else data
    headers = {"Content-Type": "application/json"}
    response = httpx.post(live.url + "/v1/completions", content=content, headers=headers, timeout=20)
    assert response.status_code == status
    assert status == 200 or words in message_of(response)


def test_a_body_that_is_not_called_json_is_refused(live: Live) -> None:
    """A page of another site may send text/plain without asking: it must not reach the model."""
    response = httpx.post(
        live.url + "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 400 and "application/json" in message_of(response)


def test_unknown_routes_and_methods_have_error_objects(live: Live) -> None:
    assert httpx.get(live.url + "/v1/nothing").status_code == 404
    wrong = httpx.get(live.url + "/v1/completions")
    assert wrong.status_code == 405 and "POST" in wrong.headers["allow"] and message_of(wrong)
    assert httpx.post(live.url + "/health").status_code == 405
    assert httpx.post(live.url + "/v1/completions").status_code == 400


# ---- Readers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(live: Live, stream: bool) -> None:
    live.engine.turn_s = 0.002
    connection = live.raw(request_bytes({"prompt": "forever", "max_tokens": 4000, "stream": stream}))
    live.wait(lambda: live.engine.live)
    if stream:
        assert b"200 OK" in connection.recv(1000)
    connection.close()
    live.wait(lambda: not live.engine.live and not live.service.replies)
    (request,) = live.engine.requests
    assert (request.id, None) in live.engine.aborted
    assert live.service.metrics.finished["abort"] >= 1


def test_a_reader_that_does_not_read_is_dropped(live: Live, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("serving.replies.MAX_UNREAD", 20000)
    endless = [tokenizer.encode("a")[0]] * 200000
    monkeypatch.setattr(live.engine, "script", lambda request, index: endless)
    monkeypatch.setattr(live.service, "max_seq_len", 10**6)
    connection = live.raw(
        request_bytes({"prompt": "a", "n": 8, "max_tokens": 200000, "stream": True, "cache_salt": "x"}), size=4096
    )
    live.wait(lambda: live.engine.live)
    live.wait(lambda: not live.engine.live and not live.service.replies)
    with connection:
        data = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert b"DONE" not in data
    assert post(live, {"prompt": "b", "max_tokens": 2}).status_code == 200


def test_a_finished_answer_that_nobody_reads_holds_no_place(live: Live, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("serving.api.SEND_TIMEOUT_S", 0.3)
    live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    many = [tokenizer.encode("a")[0]] * 3000
    monkeypatch.setattr(live.engine, "script", lambda request, index: many)
    for stream in (False, True):
        body = {"prompt": "a", "n": 8, "max_tokens": 3000, "stream": stream, "logprobs": 5}
        with live.raw(request_bytes(body), size=4096) as connection:
            live.wait(lambda: live.service.replies)
            live.wait(lambda: not live.engine.live and not live.service.replies)
            assert b"200 OK" in connection.recv(1000)


def test_a_stream_behind_an_answer_not_read_is_not_kept(live: Live, tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("serving.replies.MAX_UNREAD", 20000)
    endless = [tokenizer.encode("a")[0]] * 200000
    monkeypatch.setattr(live.engine, "script", lambda request, index: endless)
    monkeypatch.setattr(live.service, "max_seq_len", 10**6)
    live.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    first = {"prompt": "a", "max_tokens": 900, "logprobs": 5}
    second = {"prompt": "a", "n": 8, "max_tokens": 200000, "stream": True}
    with live.raw(request_bytes(first) + request_bytes(second), size=4096):
        live.wait(lambda: len(live.engine.requests) == 2)
        live.wait(lambda: not live.engine.live and not live.service.replies)


def test_headers_are_limited(live: Live) -> None:
    connection = live.raw(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ConnectionError):
        for _ in range(200):
            connection.sendall(b"X-Padding: " + b"a" * 1000 + b"\r\n")
            time.sleep(0.001)
        assert connection.recv(10)
    connection.close()


def test_many_streams_at_once_get_their_own_text(live: Live) -> None:
    results: list[str] = []

    def read() -> None:
        with openai.OpenAI(base_url=live.url + "/v1", api_key="x") as client:
            stream = client.completions.create(model="fake", prompt="a", max_tokens=99, stream=True)
            results.append("".join(event.choices[0].text for event in stream))

    threads = [threading.Thread(target=read) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [TEXT] * 12


# ---- Information ----------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.max_model_len) == ("fake", "model", 4096)
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")


def test_tokenize_and_back(live: Live, tokenizer: Tokenizer) -> None:
    reply = post(live, {"prompt": TEXT}, "/tokenize").json()
    assert reply == {"tokens": tokenizer.encode(TEXT), "count": len(tokenizer.encode(TEXT)), "max_model_len": 4096}
    assert post(live, {"tokens": reply["tokens"]}, "/detokenize").json() == {"prompt": TEXT}
    chat = post(live, {"messages": USER, "add_generation_prompt": False}, "/tokenize").json()
    assert chat["tokens"] == tokenizer.chat(USER, add_generation_prompt=False)
    assert post(live, {"tokens": [-1]}, "/detokenize").status_code == 400
    assert post(live, {"prompt": "a", "model": "other"}, "/tokenize").status_code == 404


def test_health_and_the_page_and_the_openapi_page(live: Live) -> None:
    assert httpx.get(live.url + "/health").json() == {"status": "ok"}
    assert httpx.head(live.url + "/health").status_code == 200
    page = httpx.get(live.url + "/")
    assert (
        page.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in page.headers["content-security-policy"]
    )
    assert "http://" not in page.text and "https://" not in page.text  # it works offline
    paths = httpx.get(live.url + "/openapi.json").json()["paths"]
    assert {CHAT, TEXTS, "/tokenize", "/detokenize", "/v1/models", "/health", "/metrics"} <= paths.keys()


def test_a_device_that_fails_step_after_step_is_no_healthy_one(live: Live, monkeypatch) -> None:
    stats = dataclasses.replace(live.engine.stats(), failures_in_a_row=3, failed_at=time.monotonic())
    monkeypatch.setattr(live.engine, "stats", lambda: stats)
    lost = httpx.get(live.url + "/health")
    assert lost.status_code == 503 and "3 steps failed" in message_of(lost)
    stats = dataclasses.replace(stats, failed_at=time.monotonic() - 61)  # nobody asked since: it may be well again
    assert httpx.get(live.url + "/health").status_code == 200


def test_an_answer_that_cannot_be_written_is_an_error_of_its_own(live: Live, monkeypatch) -> None:
    emit = Reply._emit

    def broken(reply: Reply, choice, text: str) -> None:
        if choice.finish_reason is not None and reply.n == 2:
            raise RuntimeError("no luck")
        emit(reply, choice, text)

    monkeypatch.setattr(Reply, "_emit", broken)
    with ThreadPoolExecutor() as pool:
        bodies = [{"prompt": "a", "n": n, "stream": True} for n in (1, 2, 1)]
        answers = [answer.text for answer in pool.map(lambda body: post(live, body), bodies)]
    assert ["the server made a mistake" in answer for answer in answers] == [False, True, False]


def test_the_access_log_has_figures_and_no_text(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tachyon.access")
    secret = {"prompt": "hello there", "max_tokens": 3, "user": "hello there"}
    response = post(live, secret, headers={"Authorization": "Bearer hello there"})
    request_id = response.headers["x-request-id"]
    # A line is written after its answer, so that of the test before this one may still come: ours is known by its id.
    live.wait(lambda: any(request_id in message for message in caplog.messages))
    (line,) = (message for message in caplog.messages if request_id in message)
    entry = json.loads(line)
    assert entry["id"] == request_id and request_id in response.json()["id"]
    assert (entry["path"], entry["status"], entry["tokens"], entry["finish"]) == ("/v1/completions", 200, 3, ["length"])
    assert entry["prompt_tokens"] > 0 and entry["ms"] >= entry["first_token_ms"] > 0
    assert "hello" not in line and "there" not in line


# ---- Servers with other options -------------------------------------------------------------------------------------


def test_keys_open_everything_but_the_page_and_health(tokenizer: Tokenizer) -> None:
    with serve(tokenizer, lambda request, index: [1], api_key=("one", "two")) as live:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            refused = httpx.get(live.url + path)
            assert (
                refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer" and message_of(refused)
            )
        assert httpx.get(live.url + "/").status_code == httpx.get(live.url + "/health").status_code == 200
        for header in ("Bearer on", "bearer one", "Bearer", "one", "Basic one", "Bearer one two"):
            status = httpx.get(live.url + "/v1/models", headers={"Authorization": header}).status_code
            assert status == (200 if header == "bearer one" else 401)
        for key, error in (("two", None), ("three", openai.AuthenticationError)):
            with openai.OpenAI(base_url=live.url + "/v1", api_key=key, max_retries=0) as client:
                if error is None:
                    assert client.models.list().data
                else:
                    with pytest.raises(error):
                        client.models.list()


def test_more_logprobs_than_fit_into_an_answer_are_refused(tokenizer: Tokenizer) -> None:
    with serve(tokenizer, lambda request, index: [1], max_answers=128) as live:
        body = {"messages": USER, "n": 100, "logprobs": True, "top_logprobs": 20}
        refused = post(live, body | {"max_tokens": 4000}, CHAT)
        assert refused.status_code == 400 and "logprobs to report" in message_of(refused)
        assert post(live, body | {"max_tokens": 2}, CHAT).status_code == 200
        assert post(live, body, CHAT).status_code == 200
        assert live.engine.requests[-1].max_new_tokens == (1 << 22) // 2100


def test_bodies_count_while_they_come(tokenizer: Tokenizer) -> None:
    part = request_bytes({"prompt": "a" * 900})[:-1]
    with serve(tokenizer, lambda request, index: [1], max_body_mb=0.001) as live, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(live.raw(part)) for _ in range(80)]  # 64 of the largest are too many
        readable, _, _ = select.select(waiting, [], [], 20)
        assert b" 429 " in readable[0].recv(1000)


def test_other_origins_are_let_in_only_when_asked(live: Live, tokenizer: Tokenizer) -> None:
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(live.url + "/v1/completions", headers=ask).headers
    with serve(tokenizer, lambda r, i: [1], cors_origin=("https://page.example",), api_key=("k",)) as other:
        allowed = httpx.options(other.url + "/v1/completions", headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        denied = httpx.options(other.url + "/v1/completions", headers=ask | {"Origin": "https://else.example"})
        assert "access-control-allow-origin" not in denied.headers


def test_requests_past_the_limit_are_told_to_come_again(tokenizer: Tokenizer) -> None:
    with serve(tokenizer, lambda request, index: [1] * 100, max_requests=2) as live:
        live.engine.held.set()
        waiting = [live.raw(request_bytes({"prompt": "a"})) for _ in range(2)]
        live.wait(lambda: len(live.engine.live) == 2)
        refused = post(live, {"prompt": "a"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert httpx.get(live.url + "/health").status_code == 200
        live.engine.held.clear()
        for connection in waiting:
            with connection:
                assert b"200 OK" in connection.recv(1000)
        live.wait(lambda: not live.service.replies)
        assert post(live, {"prompt": "a"}).status_code == 200


def test_an_engine_that_gives_a_request_up_is_busy_not_broken(live: Live) -> None:
    live.engine.broken, live.engine.broken_reason = "waited for a place for more than 3 s", "abort"
    late = post(live, {"prompt": "a"})
    assert late.status_code == 503 and "waited for a place" in message_of(late)


def test_health_tells_of_an_engine_that_has_stopped(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.engine, "stats", lambda: EngineStats(alive=False))
    assert httpx.get(live.url + "/health").status_code == 503


def test_prompts_and_bodies_together_are_limited(tokenizer: Tokenizer) -> None:
    with serve(tokenizer, lambda request, index: [1], max_prompt_tokens=5, max_body_mb=0.001) as live:
        refused = post(live, {"prompt": [1] * 6})
        assert refused.status_code == 400 and "of which a prompt may take 5" in message_of(refused)
        live.engine.held.set()
        body = {"prompt": [1] * 5, "user": "x" * 900}  # a little less than a body may have
        largest = 64 * 1000 // (len(request_bytes(body)) - request_bytes(body).index(b"{"))
        waiting = [live.raw(request_bytes(body)) for _ in range(largest)]
        live.wait(lambda: len(live.engine.live) == largest)
        with live.raw(request_bytes(body)) as refused:
            answer = refused.recv(2000)
        assert b"429" in answer and b"large requests" in answer
        for connection in waiting:
            connection.close()


def test_heads_and_bodies_that_do_not_come_are_not_waited_for(tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("serving.api.BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr("serving.server.HEAD_TIMEOUT_S", 0.05)
    with serve(tokenizer, lambda request, index: [1]) as live:
        with live.raw(request_bytes({"prompt": "a"})[:-3]) as slow:
            assert b"408" in slow.recv(1000)
        for beginning in (b"", b"POST /v1/completions HTT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
            with live.raw(beginning) as silent, contextlib.suppress(ConnectionResetError):
                assert silent.recv(1000) == b""
        assert not live.engine.requests


def test_draining_finishes_what_runs_and_takes_nothing_new(tokenizer: Tokenizer) -> None:
    with serve(tokenizer, lambda request, index: [1] * 50) as live:
        live.engine.held.set()
        running = live.raw(request_bytes({"prompt": "a", "max_tokens": 50, "stream": True}))
        live.wait(lambda: live.engine.live)
        live.server.handle_exit(15, None)
        live.wait(lambda: refuses(live.port))
        live.engine.held.clear()
        with running:
            data = b"".join(iter(lambda: running.recv(1 << 16), b""))
        assert b'"finish_reason": "length"' in data and b"[DONE]" in data
        live.thread.join(20)
        assert not live.thread.is_alive()


def test_draining_has_an_end(tokenizer: Tokenizer) -> None:
    with serve(tokenizer, lambda request, index: [1] * 50, drain_s=0.2) as live:
        live.engine.held.set()
        running = live.raw(request_bytes({"prompt": "a"}))
        live.wait(lambda: live.engine.live)
        live.server.handle_exit(15, None)
        with running:
            assert b"503" in running.recv(1000)


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it was in the queue of a socket that is being closed
        pass
    return False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70000}, "--port"),
        ({"api_key": ("",)}, "--api-key"),
        ({"api_key": ("ä",)}, "--api-key"),
        ({"max_requests": 0}, "--max-requests"),
        ({"max_body_mb": 0}, "--max-body-mb"),
        ({"drain_s": -1}, "--drain-s"),
        ({"host": "256.1.1.1"}, "cannot|not known|resolve"),
    ],
)
def test_options_that_cannot_be_are_refused(tokenizer: Tokenizer, options: dict, words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words), serve(tokenizer, lambda request, index: [], **options):
        pass


def test_a_port_in_use_is_named(live: Live, tokenizer: Tokenizer) -> None:
    message = f"cannot listen at 127.0.0.1:{live.port}.*--port"
    with pytest.raises(OSError, match=message), serve(tokenizer, lambda request, index: [], port=live.port):
        pass
