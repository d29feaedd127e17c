"""The engine's tokens turned into the API's answers: text, events of a stream, whole JSON bodies.

A `Reply` belongs to one HTTP request and lives on the event loop's thread; it knows neither HTTP nor the engine, but
says when a sample should be ended. It is fed once per token, for hundreds of streams, on a core that also launches the
GPU's work, so an event is a prepared head, the text as a JSON string, and a prepared tail: no object is built and no
model serialized for a token. What a reader has not taken yet is bounded.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as json_string
from typing import Literal

from answer import GrowingText
from serving.protocol import ApiError
from serving.request import Output, TokenLogprobs
from tokenizer import Tokenizer

MAX_UNREAD = 1 << 20  # bytes of events that a reader may be behind


@dataclass(kw_only=True)
class Choice:
    """One answer of a request."""

    index: int
    text: GrowingText
    prompt: int  # which of the request's prompts it answers
    gained: int = 0  # tokens of the latest output, those after a stop string aside
    finish_reason: str | None = None
    begun: bool = False  # an event has shown some of it
    newest: float | None = None  # when its newest token came
    logprobs: list[tuple[TokenLogprobs, int]] = field(default_factory=list)  # and where in the text each token begins
    reported: int = 0  # how many of them events have shown

    @property
    def tokens(self) -> int:
        return self.text.taken

    def certain(self) -> list[tuple[TokenLogprobs, int]]:
        """The logprobs not reported yet of tokens whose text is, at least in part."""
        shown, fresh = self.text.shown, self.logprobs[self.reported :]
        if self.finish_reason is None or self.text.stopped:
            fresh = [entry for entry in fresh if entry[1] < shown]
        self.reported += len(fresh)
        return fresh


class Reply:
    """What becomes of one HTTP request: `feed` it the engine's outputs, `wait`, and `take` events or a `body`."""

    def __init__(
        self,
        *,
        kind: Literal["chat", "text"],
        id: str,
        model: str,
        tokenizer: Tokenizer,
        arrived: float,
        prompts: Sequence[Sequence[int]],
        echo: Sequence[str] | None = None,  # the prompts' text, to begin the answers with
        n: int = 1,
        stop: Sequence[str] = (),
        stream: bool = False,
        include_usage: bool = False,
        logprobs: bool = False,
    ) -> None:
        self.kind, self.id, self.model, self.tokenizer = kind, id, model, tokenizer
        self.n, self.echo, self.with_logprobs = n, echo, logprobs
        self.stream, self.include_usage = stream, include_usage
        self.prompt_tokens = sum(map(len, prompts))
        self.cached_tokens = [0] * len(prompts)
        self.choices = [
            Choice(index=p * n + i, prompt=p, text=GrowingText(tokenizer, stop, continues=kind == "text"))
            for p in range(len(prompts))
            for i in range(n)
        ]
        self.unfinished = len(self.choices)
        self.created = int(time.time())
        self.arrived = arrived
        self.first: float | None = None  # when the first token came
        self.queued_s = 0.0
        self.error: ApiError | None = None
        self.disconnected = self.was_cut = False
        self.sending = False  # what was taken has not all gone out yet
        self.reader: asyncio.Task | None = None  # who sends the events
        self._events: list[str] = []
        self._unread = 0
        self._waiter: asyncio.Future | None = None
        shape = {"chat": "chat.completion.chunk", "text": "text_completion"}[kind] if stream else ""
        names = {"id": id, "object": shape, "created": self.created, "model": model}
        self._head = "data: " + json.dumps(names, ensure_ascii=False)[:-1]
        self._choice_head = self._head + ', "choices": [{"index": '
        self._tail = ', "usage": null}\n\n' if include_usage else "}\n\n"

    # ---- The engine's side -----------------------------------------------------------------------------------------

    def feed(self, prompt: int, output: Output, now: float) -> Choice | None:
        """Take an output of the given prompt; returns its choice if it is for an answer that goes on."""
        choice = self.choices[prompt * self.n + output.index]
        if choice.finish_reason is not None or self.error is not None:
            return None
        if output.finish_reason in ("error", "abort"):  # the model failed, or the engine's time limits
            status = 500 if output.finish_reason == "error" else 503
            self.fail(ApiError(status, output.error or "the server is stopping"))
            return None
        if self.first is None and output.token_ids:
            self.first = now
        self.cached_tokens[prompt] = max(self.cached_tokens[prompt], output.cached_tokens)
        last, before = output.finish_reason is not None, choice.tokens
        text = self._push(choice, output, last)
        choice.gained = choice.tokens - before
        choice.finish_reason = "stop" if choice.text.stopped else output.finish_reason
        if choice.finish_reason is not None:
            self.unfinished -= 1
        if self.stream and (text or choice.finish_reason is not None or self.with_logprobs):
            self._emit(choice, text)
        if self.stream or not self.unfinished:
            self.wake()
        return choice

    def _push(self, choice: Choice, output: Output, last: bool) -> str:
        if not self.with_logprobs:
            return choice.text.push(output.token_ids, last=last)
        pieces = []
        for token, entry in zip(output.token_ids, output.logprobs or (), strict=True):
            choice.logprobs.append((entry, choice.text.length))
            pieces.append(choice.text.push([token]))
        if last:
            pieces.append(choice.text.push([], last=True))
        return "".join(pieces)

    def _emit(self, choice: Choice, text: str) -> None:
        """An event with the text of one choice that became certain."""
        finish = "null" if choice.finish_reason is None else f'"{choice.finish_reason}"'
        logprobs = "null"
        if self.with_logprobs:
            entries = choice.certain()
            if not entries and not text and choice.finish_reason is None:
                return
            logprobs = json.dumps(self._logprobs(entries), ensure_ascii=False) if entries else "null"
        begins, choice.begun = not choice.begun, True
        if self.kind == "chat":
            role = '"role": "assistant", ' if begins else ""
            content = f'"delta": {{{role}"content": {json_string(text)}}}'
        else:
            if begins and self.echo is not None:
                text = self.echo[choice.prompt] + text
            content = f'"text": {json_string(text)}'
        rest = f'"logprobs": {logprobs}, "finish_reason": {finish}}}]{self._tail}'
        self._put(f"{self._choice_head}{choice.index}, {content}, {rest}")

    def _put(self, event: str) -> None:
        self._events.append(event)
        self._unread += len(event)

    @property
    def behind(self) -> bool:
        """Whether the reader has left too much unread; what we did not even try to send is not the reader's fault."""
        return self.sending and self._unread > MAX_UNREAD

    def cut(self) -> None:
        """Drop a reader who does not read."""
        if not self.was_cut and self.reader is not None:
            self.was_cut = True
            self.fail(ApiError(499, "the client does not read its answer"))
            self.reader.cancel()

    def fail(self, error: ApiError) -> None:
        """End the answer with an error, unless it has ended already."""
        if self.error is None and self.unfinished:
            self.error = error
            self.wake()

    # ---- The reader's side -----------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return not self.unfinished or self.error is not None or self.disconnected

    async def wait(self) -> None:
        """Until there are events or the end."""
        if not self._events and not self.done:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None

    def take(self) -> bytes:
        """All events that are ready; at the end, those that close the stream as well."""
        if self.error is not None:
            self._put(f"data: {json.dumps(self.error.body, ensure_ascii=False)}\n\ndata: [DONE]\n\n")
        elif not self.unfinished:
            if self.include_usage:
                self._put(f'{self._head}, "choices": [], "usage": {json.dumps(self.usage())}}}\n\n')
            self._put("data: [DONE]\n\n")
        data = "".join(self._events).encode("utf-8", "replace")
        self._events, self._unread = [], 0
        return data

    @property
    def tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    def usage(self) -> dict:
        made = self.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens)},
        }

    def body(self) -> dict:
        """The whole answer, once `done`."""
        chat = self.kind == "chat"
        choices = []
        for choice in self.choices:
            entries = choice.certain()
            logprobs = self._logprobs(entries) if self.with_logprobs else None
            text = ("" if self.echo is None else self.echo[choice.prompt]) + choice.text.text
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
            choices.append(
                {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            )
        return {
            "id": self.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
        }

    # ---- Logprobs ---------------------------------------------------------------------------------------------------

    def _logprobs(self, entries: Sequence[tuple[TokenLogprobs, int]]) -> dict:
        return self._chat_logprobs(entries) if self.kind == "chat" else self._text_logprobs(entries)

    def _chat_logprobs(self, entries: Sequence[tuple[TokenLogprobs, int]]) -> dict:
        def shown(token: int, logprob: float) -> dict:
            data = self.tokenizer.token_bytes(token, skip_special=False)
            return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

        return {
            "content": [
                shown(entry.token, entry.logprob) | {"top_logprobs": [shown(*pair) for pair in entry.top]}
                for entry, _ in entries
            ],
            "refusal": None,
        }

    def _text_logprobs(self, entries: Sequence[tuple[TokenLogprobs, int]]) -> dict:
        def name(token: int) -> str:
            return self.tokenizer.token_bytes(token, skip_special=False).decode("utf-8", "replace")

        return {
            "tokens": [name(entry.token) for entry, _ in entries],
            "token_logprobs": [finite(entry.logprob) for entry, _ in entries],
            "top_logprobs": [{name(token): finite(value) for token, value in entry.top} for entry, _ in entries],
            "text_offset": [offset for _, offset in entries],
        }


def finite(logprob: float) -> float:
    """JSON has no infinity: the official API gives -9999 for a token that could not be."""
    return max(logprob, -9999.0)
