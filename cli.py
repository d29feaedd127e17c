"""What every command line of the project shares: options from dataclasses, one-line errors, JSON on stdout.

Options are written once, as frozen dataclasses whose fields carry their help text; argparse takes names, types and
defaults from them. A user's mistake raises ValueError or OSError anywhere below and ends here as one line on standard
error and exit code 2.
"""

import argparse
import dataclasses
import json
import logging
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


SAMPLING_HELP = {
    "repetition_penalty": "above 1 makes tokens of the prompt and the answer less likely",
    "presence_penalty": "subtracted from the logit of a token that the answer has",
    "frequency_penalty": "subtracted each time that the answer has it",
    "temperature": "0 takes the most likely token; 1 samples the model's own distribution",
    "top_k": "sample among the k most likely tokens; 0 is off",
    "top_p": "sample among the fewest tokens whose probabilities reach p; 1 is off",
    "min_p": "sample among tokens at least min_p times as likely as the likeliest; 0 is off",
}


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake in the arguments shown as every other: in one line."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def option(
    default: Any, text: str, *, choices: tuple[str, ...] | None = None, metavar: str | None = None, many: bool = False
) -> Any:
    """A dataclass field with its help text.

    A tuple default makes an option that may be given several times, each time with several values where `many`.
    """
    metadata = {"help": text, "choices": choices, "metavar": metavar, "many": many}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, options: type, *, texts: dict[str, str] | None = None) -> None:
    """Add one `--flag` for each field of a dataclass, or for those named in `texts`, which are then its help texts."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if texts is not None and field.name not in texts:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = texts[field.name] if texts else field.metadata["help"]
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = next(t for t in kind.__args__ if t is not types.NoneType)
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=field.default, help=text)
        elif isinstance(field.default, tuple):
            several = {"action": "extend", "nargs": "+"} if field.metadata["many"] else {"action": "append"}
            parser.add_argument(flag, default=[], help=text, metavar=field.metadata.get("metavar"), **several)
        else:
            extra = {key: field.metadata[key] for key in ("choices", "metavar") if field.metadata.get(key)}
            if field.default is not None:
                text += f" (default: {field.default})"
            parser.add_argument(flag, type=kind, default=field.default, help=text, **extra)


def take_options(options: type[T], arguments: argparse.Namespace, *, skip: tuple[str, ...] = ()) -> T:
    """The dataclass `options` filled from parsed arguments."""
    names = [field.name for field in dataclasses.fields(options) if field.name not in skip]
    values = {name: getattr(arguments, name) for name in names}
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def run(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command line; a user's mistake becomes one line and exit code 2, Ctrl-C exit code 130."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("tachyon").setLevel(logging.INFO)
    try:
        command(arguments)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedy = "take fewer rows, a shorter context or a smaller model"
        print(f"error: out of memory; {remedy}:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def read_text(path: Path) -> str:
    """A file that the user named, as text; a byte order mark is no part of it."""
    return decode_text(path.read_bytes(), str(path))


def decode_text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{source} is not UTF-8 text") from None


def show_progress(done: int, total: int) -> None:
    """Loading, as a line on a terminal."""
    if sys.stderr.isatty():
        end = "\r" if done < total else "\r\033[K"
        print(f"loading {done / total:4.0%}", end=end, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False))
