"""A chat at the terminal: reads lines, streams answers, keeps the conversation.

It knows messages and text only. `encode` turns the conversation into a prompt, `answer` streams what the model says to
it; that the model keeps its cache between turns is their affair. Ctrl-C stops an answer and keeps what was said.
"""

import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HELP = "/reset forgets the conversation, /stats shows figures, /save FILE writes it as JSON, /exit or Ctrl-D leaves"


def repl(
    encode: Callable[[list[dict]], list[int]],
    answer: Callable[[list[int]], Iterator[str]],
    system: list[dict],
    stats: Callable[[], str],
) -> None:
    """Chat until the end of input; `system` holds the messages that every conversation starts with."""
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):
        import readline  # noqa: F401  importing it gives input() line editing and history
    messages = list(system)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        command, _, argument = line.partition(" ")
        if not line:
            continue
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            messages = list(system)
        elif command == "/stats":
            print(stats(), file=sys.stderr)
        elif command == "/save":
            _save(messages, argument.strip())
        elif command.startswith("/"):
            print(HELP, file=sys.stderr)
        else:
            try:
                text = _stream(answer(encode([*messages, {"role": "user", "content": line}])))
            except ValueError as error:  # as when the conversation has outgrown the context; it stays as it was
                print(f"error: {error}; /reset starts anew", file=sys.stderr)
                continue
            messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]


def _stream(pieces: Iterator[str]) -> str:
    """Print pieces as they come; Ctrl-C ends them between two tokens, never inside the model."""
    said = []
    with _interruptible() as interrupted:
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
            if interrupted:
                pieces.close()
                break
    print()
    return "".join(said)


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C is pressed."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _save(messages: list[dict], name: str) -> None:
    if not name:
        print("/save needs a file name", file=sys.stderr)
        return
    try:
        Path(name).write_text(json.dumps(messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{len(messages)} messages are in {name}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
