"""What a request to the API may say, and how a mistake in one is answered.

Requests are read strictly and completely: a field that is not here is refused by its name, and so is a value that
would have to be ignored. Names are the OpenAI API's, then vLLM's. This file knows no tokenizer and no engine: it turns
JSON into checked values, and errors into the objects and status codes that the official client expects.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator
from pydantic_core import ErrorDetails

from sampling import SamplingParams

T = TypeVar("T")

MAX_STOPS = 16  # stop strings in a request, each ...
MAX_STOP_LENGTH = 1024  # ... of so many characters at most
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_FIELDS = 64  # of an object with fields of its own
INT63 = 2**63 - 1
SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"
)  # fmt: skip

# Fields of the official API that this server does not have, and the values with which they ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None,),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None,),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
NEUTRAL_OF_MESSAGES: dict[str, tuple] = {
    name: (None, []) for name in ("annotations", "audio", "function_call", "refusal", "tool_calls")
}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer with an error's status code; `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    @property
    def body(self) -> dict:
        kind = ERROR_TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorObject


def invalid(errors: Sequence[ErrorDetails]) -> ApiError:
    """What is wrong with the first wrong field of a body; alternatives of its type are joined."""
    path = _path(errors[0])
    field = path[0] if path else None
    if errors[0]["type"] == "extra_forbidden":
        name = ".".join(map(str, path))
        return ApiError(400, f"{name} is not supported by this server; leave it out", param=name)
    same = [error for error in errors if _path(error)[:1] == path[:1]]
    # Of the alternatives of a type the one that fits best is wrong furthest inside.
    furthest = max(len(error["loc"]) for error in same)
    same = [error for error in same if len(error["loc"]) == furthest]
    message = " or ".join(dict.fromkeys(error["msg"].removeprefix("Value error, ") for error in same))
    place = _place([error["loc"] for error in same])
    return ApiError(400, f"{place}: {message}" if place else message, param=field and str(field))


def _path(error: ErrorDetails) -> list[int | str]:
    """Where a body is wrong, without the name of the model that it was held against."""
    models = {model.__name__ for model in (TokenizeRequest, TokenizeChatRequest)}
    return [part for part in error["loc"] if part != "body" and part not in models]


def _place(locations: Sequence[Sequence[int | str]]) -> str:
    """Where in a body several errors are, as messages[0].content."""
    # pydantic names the alternatives of a type on the way as well
    known = [[part for part in loc if isinstance(part, int) or part in _names(Strict)] for loc in locations]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*known, strict=False))]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shared).removeprefix(".")


@functools.cache
def _names(model: type["Strict"]) -> frozenset[str]:
    """Of the fields of all that a body may hold."""
    own = (field.alias or name for name, field in model.model_fields.items())
    return frozenset(own).union(*map(_names, model.__subclasses__()))


def with_settings(params: SamplingParams, settings: Mapping[str, float]) -> SamplingParams:
    """`params` but for these fields; a top_k of -1 is off, as vLLM has it."""
    return replace(params, **{name: 0 if (name, value) == ("top_k", -1) else value for name, value in settings.items()})


def few(data: Any, most: int) -> Any:
    """`data`, unless it is an object of more fields than `most`: each that is wrong would cost an error of its own."""
    if isinstance(data, dict) and len(data) > most:
        raise ValueError(f"at most {most} fields; got {len(data)}")
    return data


class _FirstError(FailFast):
    """A body may hold a million elements, each of them wrong: one error is enough."""

    __hash__ = object.__hash__  # which unions of types need


Many = Annotated[list[T], _FirstError()]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: Any) -> Any:
        return few(data, MAX_FIELDS)

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields[info.field_name]
        return field.get_default() if value is None and not field.is_required() else value


def without_neutral(data: Any, neutral: dict[str, tuple]) -> Any:
    if not isinstance(data, dict):
        return data
    return {
        k: v for k, v in data.items() if not any(v is n or (type(v) is type(n) and v == n) for n in neutral.get(k, ()))
    }


class StreamOptions(Strict):
    include_usage: bool | None = False


class JsonSchema(Strict):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # every schema is kept to


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and that with it")
        return self


class StructuredOutputs(Strict):
    """vLLM's field: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = False
    regex: str | None = None
    choice: Many[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="in Lark's notation")


class Generation(Strict):
    """What chats and completions have in common."""

    model: str | None = Field(None, description="the name that /v1/models gives; may be left out")
    n: int | None = Field(1, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    seed: int | None = Field(None, ge=-INT63 - 1, le=INT63, description="makes sampling repeatable")
    temperature: float | None = Field(None, ge=0.0, le=1e4, description="left out, the model's own, else 1")
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off")
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100.0)
    logit_bias: dict[str, float] | None = Field(None, description="token id: what is added to its logit, -100 to 100")
    max_tokens: int | None = Field(None, ge=1)
    ignore_eos: bool | None = False
    priority: int | None = Field(0, ge=-(2**31), le=2**31 - 1, description="the lower, the sooner")
    user: str | None = Field(None, description="accepted, and not kept")
    cache_salt: str | None = Field(
        None, max_length=256, description="prefixes are shared only between requests of equal salts"
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = Field(None, description="in Lark's notation")

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return without_neutral(data, NEUTRAL)

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> list[str]:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_LENGTH:
            raise ValueError(f"at most {MAX_STOPS} stop strings of {MAX_STOP_LENGTH} characters")
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, bias: Any) -> Any:
        return few(bias, MAX_BIASES)

    @field_validator("logit_bias")
    @classmethod
    def _biases(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) <= 10):
                raise ValueError(f"{token[:20]!r} is not a token id")
            if not -100.0 <= value <= 100.0:
                raise ValueError(f"the bias of token {token} must be between -100 and 100; got {value}")
        return bias

    @model_validator(mode="after")
    def _fits_together(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        self.constraint_spec()
        return self

    def params(self, seed: int, defaults: SamplingParams) -> SamplingParams:
        """How to sample; what the request leaves out is as in `defaults`."""
        own = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return with_settings(defaults, own | {"seed": seed})

    def constraint_spec(self) -> tuple[str, Any] | None:
        """("json" | "regex" | "choice" | "grammar", what it is), or None where the answer is free."""
        asked: list[tuple[str, Any]] = []
        if (form := self.response_format) is not None and form.type != "text":
            schema = form.json_schema.schema_ if form.json_schema else None
            asked.append(("json", {"type": "object"} if schema is None else schema))
        if (more := self.structured_outputs) is not None:
            fields = (("json", more.json_), ("regex", more.regex), ("choice", more.choice), ("grammar", more.grammar))
            chosen = [(kind, value) for kind, value in fields if value is not None]
            chosen += [("json", {"type": "object"})] if more.json_object else []
            if not chosen:
                raise ValueError("structured_outputs needs json, json_object, regex, choice or grammar")
            asked += chosen
        asked += [("regex", self.guided_regex)] if self.guided_regex is not None else []
        asked += [("grammar", self.guided_grammar)] if self.guided_grammar is not None else []
        if len(asked) > 1:
            raise ValueError("an answer is held to one of response_format, structured_outputs and guided_* at most")
        return asked[0] if asked else None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Many[TextPart]
    name: str | None = None  # for templates that show it

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        return without_neutral(data, NEUTRAL_OF_MESSAGES)


class Conversation(Strict):
    """What a chat template is given."""

    messages: Many[Message] = Field(min_length=1)
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = Field(
        None, description="the template's own variables, as enable_thinking"
    )

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _few_variables(cls, kwargs: Any) -> Any:
        return few(kwargs, MAX_FIELDS)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_variables(cls, kwargs: dict | None) -> dict | None:
        if reserved := {"messages", "add_generation_prompt", "tools", "documents", "self"} & (kwargs or {}).keys():
            raise ValueError(f"{min(reserved)} is not the template's own variable")
        return kwargs


class ChatRequest(Conversation, Generation):
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _one_length(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None: not even its own logprob."""
        return self.top_logprobs if self.logprobs else None

    @property
    def length(self) -> int | None:
        """Tokens of an answer at most; None: what the context holds."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Generation):
    prompt: str | Many[str] | Many[int] | Many[Many[int]]
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("echo does not go with logprobs: a prompt's own are not computed")
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def length(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # the official API's default

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = True


class TokenizeChatRequest(Conversation):
    model: str | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Many[int]
