"""Answers held to a JSON schema, a regular expression or a grammar, through llguidance.

A grammar is compiled once for a request; each of its samples then walks a copy. The engine knows the protocol
`request.Constraint` only: a bit mask over the vocabulary before a token, and the token after it. This file knows no
HTTP and no model, but the tokenizer's bytes.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from tokenizer import Tokenizer

MAX_GRAMMAR = 1 << 16  # characters of a schema, expression or grammar
KEPT = 64  # compiled grammars
# White space is free, but bounded: small models would go on with it for ever.
JSON_STYLE = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,16}"}


class GrammarConstraint:
    """One sample's way through a grammar; `request.Constraint`."""

    def __init__(self, matcher: LLMatcher, *, words: int, eos_ids: Sequence[int]) -> None:
        self.matcher, self.words, self.eos_ids = matcher, words, eos_ids

    def mask(self) -> numpy.ndarray:
        """Bits of the tokens that may follow: int32 [words]."""
        mask = numpy.zeros(self.words, dtype=numpy.int32)  # the model's vocabulary may be longer than the tokenizer's
        known = numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.int32)[: self.words]
        mask[: len(known)] = known
        if not mask.any():  # a grammar that grew too complex: nothing is left but to end
            for token in self.eos_ids:
                mask.view(numpy.uint32)[token // 32] |= numpy.uint32(1 << token % 32)
        return mask

    def accept(self, token: int) -> bool:
        """Go past a token; False: the grammar is complete and nothing may follow."""
        return self.matcher.consume_token(token) and not self.matcher.is_stopped()


class Grammars:
    """Compiles what requests ask for; one for each tokenizer, any thread."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Sequence[int]) -> None:
        if not eos_ids:
            raise ValueError("the checkpoint names no end-of-text token, which answers held to a grammar end with")
        self.words, self.eos_ids = -(-vocab_size // 32), tuple(eos_ids)
        wrapper = TokenizerWrapper(_Vocabulary(tokenizer, eos_ids[0]))
        self.tokenizer = LLTokenizer(wrapper, eos_token=list(eos_ids))
        self.matcher = functools.lru_cache(KEPT)(self._matcher)

    def constraint(self, kind: str, spec: Any) -> Callable[[], GrammarConstraint]:
        """What makes a constraint for each sample; ValueError if the grammar is none."""
        matcher = self.matcher(kind, spec if isinstance(spec, str) else json.dumps(spec))
        return lambda: GrammarConstraint(matcher.deep_copy(), words=self.words, eos_ids=self.eos_ids)

    def _matcher(self, kind: str, text: str) -> LLMatcher:
        if len(text) > MAX_GRAMMAR:
            raise ValueError(f"the {kind} has {len(text)} characters, more than {MAX_GRAMMAR}")
        if kind == "json":
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
        elif kind == "regex":
            grammar = LLMatcher.grammar_from_regex(text)
        elif kind == "choice":
            choices = map(json.dumps, json.loads(text))
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        else:
            grammar = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the {kind} is refused: {' '.join(matcher.get_error().split())[:500]}")
        return matcher


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i, skip_special=False) for i in ids]
        self.special_token_ids = [i for i in ids if self.tokens[i] and not tokenizer.token_bytes(i)]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self.tokenizer.encode(text, special=False)
