"""Grammars as masks over a vocabulary."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from serving.constraints import GrammarConstraint, Grammars
from tokenizer import Tokenizer, load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_directory: Path) -> Tokenizer:
    return load_tokenizer(tiny_directory)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, vocab_size=tokenizer.vocab_size + 70, eos_ids=tokenizer.eos_ids)


def allowed(constraint: GrammarConstraint) -> set[int]:
    mask = constraint.mask()
    assert mask.dtype == np.int32
    return {i for i in range(32 * len(mask)) if int(mask[i // 32]) >> i % 32 & 1}


def takes(grammars: Grammars, tokenizer: Tokenizer, kind: str, spec: object, text: str) -> bool | None:
    """Whether a text, token by token, is what the grammar wants; None: it may go on from there but not end."""
    constraint = grammars.constraint(kind, spec)()
    tokens = tokenizer.encode(text)
    for i, token in enumerate(tokens):
        if token not in allowed(constraint):
            return False
        if not constraint.accept(token):
            return i == len(tokens) - 1
    return True if tokenizer.eos_ids[0] in allowed(constraint) else None


@pytest.mark.parametrize(
    ("kind", "spec", "text", "expected"),
    [
        ("json", SCHEMA, '{"name": "Bo", "age": 12}', True),
        ("json", SCHEMA, '{"name":"Bo","age":12}', True),
        ("json", SCHEMA, '{\n  "name": "Bo",\n  "age": -3\n}', True),
        ("json", json.dumps(SCHEMA), '{"name": "Bo", "age": 1', None),
        ("json", SCHEMA, '{"name": "Bodo", "age": 1}', False),
        ("json", SCHEMA, '{"name": "Bo"}', False),
        ("json", SCHEMA, '{"name": "Bo", "age": 1, "more": 2}', False),
        ("json", {"type": "object"}, '{"a": [1, {"b": null}]}', True),
        ("json", {"type": "object"}, "[1]", False),
        ("json", {"type": "object"}, "{" + " " * 17, False),
        ("json", {"enum": ["naïve", "你好"]}, '"你好"', True),
        ("regex", "[ab]{2,3}", "ab", True),
        ("regex", "[ab]{2,3}", "abb", True),
        ("regex", "[ab]{2,3}", "a", None),
        ("regex", "[ab]{2,3}", "abbb", False),
        ("choice", ["yes", "no", 'say "x"\n'], 'say "x"\n', True),
        ("choice", ["yes", "no"], "y", None),
        ("choice", ["yes", "no"], "yesno", False),
        ("grammar", 'start: "a" ("," "b")*', "a,b,b", True),
        ("grammar", 'start: "a" ("," "b")*', "a,", None),
    ],
)
def test_a_grammar_takes_its_texts_and_no_other(
    grammars: Grammars, tokenizer: Tokenizer, kind: str, spec: object, text: str, expected: bool | None
) -> None:
    assert takes(grammars, tokenizer, kind, spec, text) is expected


@pytest.mark.parametrize("kind", ["json", "regex"])
def test_whatever_the_mask_allows_is_a_text_of_the_grammar(grammars: Grammars, tokenizer: Tokenizer, kind: str) -> None:
    """A walk over allowed tokens, always the last or the first of them, ends in a text that its language reads."""
    for pick in (min, max):
        constraint, tokens = grammars.constraint(kind, SCHEMA if kind == "json" else "[a-c]+x?")(), []
        for _ in range(60):
            token = pick(allowed(constraint) - set(tokenizer.eos_ids) or tokenizer.eos_ids)
            if token in tokenizer.eos_ids:
                break
            tokens.append(token)
            if not constraint.accept(token):
                break
        text = tokenizer.decode(tokens)
        if kind == "regex":
            assert set(text) <= set("abcx")
        elif not constraint.matcher.is_stopped():
            assert text.startswith("{")
        else:
            assert json.loads(text).keys() == {"name", "age"}


def test_samples_walk_a_grammar_apart(grammars: Grammars, tokenizer: Tokenizer) -> None:
    make = grammars.constraint("regex", "ab|cd")
    first, second = make(), make()
    (a,), (c,) = tokenizer.encode("a"), tokenizer.encode("c")
    assert first.accept(a) and second.accept(c)
    assert not allowed(first) & allowed(second)
    assert allowed(first) == allowed(first)  # looking changes nothing
    assert {a, c} <= allowed(make())


def test_no_special_token_and_none_outside_the_vocabulary_is_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.constraint("regex", r"(.|\n)*")()
    specials = {i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)} - set(tokenizer.eos_ids)
    assert specials and not specials & allowed(constraint)
    assert max(allowed(constraint)) < tokenizer.vocab_size
    assert set(tokenizer.eos_ids) <= allowed(constraint)
    assert len(constraint.mask()) == -(-(tokenizer.vocab_size + 70) // 32)


def test_a_mask_is_cut_to_a_smaller_model(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, vocab_size=64, eos_ids=tokenizer.eos_ids)
    assert len(grammars.constraint("regex", "a*")().mask()) == 2


def test_a_token_that_the_grammar_forbids_ends_the_sample(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.constraint("regex", "ab")()
    assert not constraint.accept(tokenizer.encode("x")[0])
    assert allowed(constraint) == set(tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("json", {"type": "objekt"}),
        ("json", "{"),
        ("json", {"type": "string", "pattern": "("}),
        ("regex", "(a"),
        ("regex", "a" * 70000),
        ("grammar", "foo"),
        ("grammar", "start: missing"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(grammars: Grammars, kind: str, spec: object) -> None:
    with pytest.raises(ValueError) as caught:
        grammars.constraint(kind, spec)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_grammar_is_compiled_once(grammars: Grammars) -> None:
    makes = [grammars.constraint("json", spec) for spec in itertools.repeat({"type": "array"}, 3)]
    before = grammars.matcher.cache_info().misses
    grammars.constraint("json", {"type": "array"})
    assert grammars.matcher.cache_info().misses == before and all(make().mask().any() for make in makes)


def test_a_checkpoint_without_an_end_has_no_grammars(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no end-of-text token"):
        Grammars(tokenizer, vocab_size=tokenizer.vocab_size, eos_ids=())
