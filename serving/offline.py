"""Prompts from a file of JSON lines through the batching engine; answers come out as they are done.

    {"prompt": "Once upon a time", "max_new_tokens": 64}
    {"id": "q7", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "temperature": 0.7, "n": 2}

A line is such an object, or a string, which is a prompt. The file may be larger than memory: it is looked through once
for mistakes, and then read as the engine has room. A line that cannot be run, as one with too long a prompt, is
reported in its place and the others go on. A line's n answers have their `index`.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from answer import GrowingText
from sampling import SamplingParams
from serving.engine import Engine
from serving.request import Output, Request
from tokenizer import Tokenizer

SAMPLING = {f.name: type(f.default) for f in dataclasses.fields(SamplingParams)}
ROLES = ("system", "developer", "user", "assistant")
KINDS = {str: "text", list: "a list", int: "a whole number", float: "a number"}
FIELDS = {"id": str, "prompt": str, "messages": list, "max_new_tokens": int, "stop": list, "n": int, **SAMPLING}


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds for lines that do not say otherwise."""

    params: SamplingParams
    max_new_tokens: int
    n: int = 1
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    chat: bool = False  # prompts that are text go into the chat template
    system: str | None = None  # the first message of each
    max_seq_len: int | None = None  # context, answer included


def read(path: Path) -> Iterator[tuple[int, dict]]:
    """The number and the fields of each line that is not empty; ValueError at the first that is not understood."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield number, _fields(json.loads(text))
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}, is not UTF-8 text") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error.msg} in column {error.colno}") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def check(path: Path) -> int:
    """How many prompts a file has; ValueError if a line is wrong or there is none."""
    count = sum(1 for _ in read(path))
    if not count:
        raise ValueError(f"{path} has no prompt: write one JSON object or string a line")
    return count


def _fields(line: object) -> dict:
    if isinstance(line, str):
        return {"prompt": line}
    if not isinstance(line, dict):
        raise ValueError("it is neither a JSON object nor a string")
    for name, value in line.items():
        if name not in FIELDS:
            raise ValueError(f"there is no field {name!r}; there are {', '.join(FIELDS)}")
        kind = FIELDS[name]
        number = kind is float and isinstance(value, int)
        if isinstance(value, bool) or not (isinstance(value, kind) or number):
            raise ValueError(f"{name} must be {KINDS[kind]}; got {value!r}")
    if ("prompt" in line) == ("messages" in line):
        raise ValueError("give a prompt or messages, one of the two")
    if "messages" in line:
        _check_messages(line["messages"])
    if not all(isinstance(text, str) and text for text in line.get("stop", ())):
        raise ValueError(f"stop must be a list of texts; got {line['stop']!r}")
    for name in ("max_new_tokens", "n"):
        if line.get(name, 1) < 1:
            raise ValueError(f"{name} must be at least 1; got {line[name]}")
    SamplingParams(**{name: line[name] for name in SAMPLING if name in line})
    return line


def _check_messages(messages: list) -> None:
    """ValueError unless these are messages that the API takes, too."""
    if not messages:
        raise ValueError("messages must not be empty")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
        if not all(isinstance(text, str) for text in texts) or message.get("role") not in ROLES:
            raise ValueError(f"a message has a role ({', '.join(ROLES)}) and a text as its content; got {message!r}")


@dataclass(kw_only=True, eq=False)
class Job:
    """A line's request, and what has come of it."""

    line: int
    name: str | None = None
    request: Request | None = None
    texts: list[GrowingText] = field(default_factory=list)  # of each sample
    token_ids: list[list[int]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    error: str | None = None
    first_token: float | None = None  # by time.monotonic

    def take(self, output: Output) -> bool:
        """Add an output to its sample. True if it came to a stop string, and the engine has to end it."""
        i = output.index
        if self.reasons[i] is not None:
            return False  # what was under way when it ended
        self.first_token = self.first_token or time.monotonic()
        self.texts[i].push(output.token_ids, last=output.finish_reason is not None)
        self.token_ids[i] += output.token_ids[: self.texts[i].taken - len(self.token_ids[i])]
        self.error = self.error or output.error
        self.reasons[i] = "stop" if self.texts[i].stopped else output.finish_reason
        return self.texts[i].stopped and output.finish_reason is None

    @property
    def samples(self) -> list[dict]:
        """What is reported: for each sample its line, tokens and text, or the line's error."""
        head = {"line": self.line} | ({} if self.name is None else {"id": self.name})
        if not self.texts:
            return [head | {"finish_reason": "error", "error": self.error}]
        return [
            head
            | ({"index": index} if self.request.n > 1 else {})
            | {"prompt_tokens": len(self.request.prompt), "token_ids": tokens, "text": text.text}
            | {"finish_reason": reason}
            | ({"error": self.error} if reason == "error" else {})
            for index, (tokens, text, reason) in enumerate(zip(self.token_ids, self.texts, self.reasons, strict=True))
        ]


def make_job(number: int, fields: Mapping, defaults: Defaults, tokenizer: Tokenizer) -> Job:
    """A line as a request; ValueError in `error`."""
    job = Job(line=number, name=fields.get("id"))
    system = [] if defaults.system is None else [{"role": "system", "content": defaults.system}]
    templated = "messages" in fields or defaults.chat or bool(system)
    try:
        if templated:
            messages = fields.get("messages") or [{"role": "user", "content": fields["prompt"]}]
            prompt = tokenizer.chat([*system, *messages])
        else:
            prompt = tokenizer.encode(fields["prompt"])
        own = {name: fields[name] for name in SAMPLING if name in fields}
        new = fields.get("max_new_tokens", defaults.max_new_tokens)
        if (limit := defaults.max_seq_len) is not None:
            if len(prompt) >= limit:
                raise ValueError(f"the prompt has {len(prompt)} tokens and the context holds {limit}, answer included")
            new = min(new, limit - len(prompt))
        job.request = Request(
            id=str(number),
            prompt=prompt,
            params=dataclasses.replace(defaults.params, **own),
            n=fields.get("n", defaults.n),
            max_new_tokens=new,
            stop_ids=defaults.stop_ids,
        )
    except ValueError as error:
        job.error = str(error)
        return job
    stop = fields.get("stop", defaults.stop)
    for _ in range(job.request.n):
        job.texts.append(GrowingText(tokenizer, stop, continues=not templated))
        job.token_ids.append([])
        job.reasons.append(None)
    return job


def run(
    engine: Engine, jobs: Iterable[Job], *, window: int, turned: Callable[[], None] = lambda: None
) -> Iterator[Job]:
    """The jobs as they are done, of which `window` are in the engine at a time; `turned` is called after each step."""
    coming, live = iter(jobs), {}
    try:
        while True:
            while len(live) < window and (job := next(coming, None)) is not None:
                if job.error is None:
                    try:
                        engine.add(job.request)
                        live[job.request.id] = job
                        continue
                    except ValueError as error:
                        job.error, job.texts = str(error), []
                yield job
            if not live:
                return
            outputs = engine.step()
            turned()
            for output in outputs:
                job = live.get(output.request_id)
                if job is None:
                    continue
                if job.take(output):
                    engine.abort(output.request_id, output.index)
                if all(job.reasons):
                    yield live.pop(output.request_id)
    finally:  # also when the caller stops early
        for name in live:
            engine.abort(name)
        while engine.busy:
            engine.step()
