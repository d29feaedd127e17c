"""Text to token ids and back: HF `tokenizer.json`, SentencePiece `tokenizer.model` and the vocabularies inside GGUF.

Two back ends stand behind one interface: `BPETokenizer` wraps the `tokenizers` library, `SentencePieceTokenizer` the
`sentencepiece` library. A GGUF vocabulary is rebuilt as whichever of the two it came from, so the same code encodes it.

The one idea: a token is a fixed run of bytes. Decoding joins the bytes and reads them as UTF-8, and streaming feeds
them one token at a time to an incremental UTF-8 decoder. It costs the same for every token, never emits half a
character, and gives exactly the text that decoding the whole list gives.

Chat templates come with the checkpoint and are not trusted: they run in jinja2's immutable sandbox.

This file knows nothing of models, prompts' lengths or when to stop: it only says what the checkpoint's end ids are.
"""

import codecs
import functools
import json
import re
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

MAX_TEMPLATE_BYTES = 1 << 20
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a chat template may name

# The types of tokens in GGUF and in SentencePiece; both use these numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


class TextStream:
    """Incremental decoding of one answer; the pieces joined are what `Tokenizer.decode` gives for all the ids."""

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""
        return self._strip(self._utf8.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """What is left: an incomplete character becomes U+FFFD."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if text and self._strip_space:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a checkpoint says besides the vocabulary; `config` is its tokenizer_config.json, kept for saving."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: dict[str, str]  # a role, as in "bos_token", and the token's text
    config: dict


class Tokenizer(ABC):
    """What both back ends share."""

    def __init__(self, settings: Settings, *, vocab_size: int, prefix_space: bool) -> None:
        self.settings = settings
        self.vocab_size = vocab_size
        self.bos_id = settings.bos_id
        self.eos_ids = settings.eos_ids
        self.chat_template = settings.chat_template
        self.prefix_space = prefix_space  # encoding puts a space before the text, so decoding takes one away
        self._table: dict[int, tuple[bytes, bool]] = {}

    @abstractmethod
    def _encode(self, text: str, *, special: bool, parse_special: bool) -> list[int]: ...

    @abstractmethod
    def _token(self, token_id: int) -> tuple[bytes, bool]:
        """A token's bytes and whether it is a special one; no bytes for an id outside the vocabulary."""

    @abstractmethod
    def _save_vocabulary(self, directory: Path) -> dict[str, object]:
        """Write the vocabulary's file; returns what tokenizer_config.json has to say of it."""

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        """`special` adds BOS / EOS as the checkpoint says; `parse_special` reads special tokens written in the text."""
        if not text.isascii():  # a lone surrogate, as command lines and JSON may hold, has no UTF-8: make it U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._encode(text, special=special, parse_special=parse_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """The text of ids; `continues` keeps the first space, for text that goes on from a prompt."""
        data = b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.prefix_space and not continues else text

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> TextStream:
        """Incremental `decode` with the same options."""
        token_bytes = functools.partial(self.token_bytes, skip_special=skip_special)
        return TextStream(token_bytes, strip_space=self.prefix_space and not continues)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        if token_id not in self._table:
            self._table[token_id] = self._token(token_id)
        data, is_special = self._table[token_id]
        return b"" if is_special and skip_special else data

    def render_chat(self, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs: object) -> str:
        """The conversation as the checkpoint's chat template writes it; kwargs are the template's own variables."""
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template: leave out --chat, or put a chat_template.jinja in its directory"
            )
        variables = {"tools": None, "documents": None, **self.settings.special_tokens, **kwargs}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return render_template(self.chat_template, variables)

    def chat(self, messages: list[dict], *, add_generation_prompt: bool = True, **kwargs: object) -> list[int]:
        """Ids of the rendered conversation: the template writes every special token itself, BOS included."""
        messages = [plain_message(message) for message in messages]
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        return self.encode(text, special=False, parse_special=True)

    def save(self, directory: Path) -> None:
        """Write files that `load_tokenizer` and transformers' AutoTokenizer load."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {"clean_up_tokenization_spaces": False, **self.settings.config, **self.settings.special_tokens}
        config |= {"chat_template": self.chat_template, **self._save_vocabulary(directory)}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def plain_message(message: dict) -> dict:
    """As every template takes it: its parts of text in one piece, and a developer as the system."""
    content, role = message["content"], message["role"]
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return message | {"role": "system" if role == "developer" else role, "content": content}


class BPETokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`, from tokenizer.json or rebuilt from GGUF."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: Settings) -> None:
        # Decoding is done here, so the library's decoder is only read, to learn what a token's text stands for.
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        self._byte_level = "ByteLevel" in steps
        self._byte_fallback = "ByteFallback" in steps
        if not self._byte_level and not steps.keys() & {"Replace", "Metaspace"}:
            raise ValueError(
                f"tokenizer.json has the decoder {list(steps)}: supported are ByteLevel, Metaspace and "
                "Replace + ByteFallback; use a checkpoint of a supported architecture"
            )
        strips = "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        super().__init__(settings, vocab_size=backend.get_vocab_size(), prefix_space=strips and not self._byte_level)
        backend.no_padding()
        backend.no_truncation()
        config = settings.config
        if "add_bos_token" in config or "add_eos_token" in config:  # as in transformers, these overrule tokenizer.json
            start = [self.bos_id] if config.get("add_bos_token") and self.bos_id is not None else []
            end = self.eos_ids[:1] if config.get("add_eos_token") else ()
            names = {token_id: backend.id_to_token(token_id) for token_id in (*start, *end)}
            backend.post_processor = processors.TemplateProcessing(
                single=[*(names[i] for i in start), "$A", *(names[i] for i in end)],
                special_tokens=[(text, token_id) for token_id, text in names.items()],
            )
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._lock = threading.Lock()  # encode_special_tokens is a switch of the whole backend

    def _encode(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            return self._backend.encode(text, add_special_tokens=special).ids

    def _token(self, token_id: int) -> tuple[bytes, bool]:
        text = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if text is None:
            return b"", False
        added = self._added.get(token_id)
        is_special = added is not None and added.special
        if self._byte_level:
            in_alphabet = added is None and BYTE_OF_CHAR.keys() >= set(text)
            return bytes(BYTE_OF_CHAR[char] for char in text) if in_alphabet else text.encode(), is_special
        if self._byte_fallback and (byte := BYTE_PIECE.fullmatch(text)):
            return bytes.fromhex(byte[1]), is_special
        return text.replace("▁", " ").encode(), is_special

    def _save_vocabulary(self, directory: Path) -> dict[str, object]:
        self._backend.save(str(directory / "tokenizer.json"))
        return {}


class SentencePieceTokenizer(Tokenizer):
    """A serialized SentencePiece model, and the tokens added to it: their text, id and whether they are special."""

    def __init__(self, proto: bytes, settings: Settings, *, added: Mapping[str, tuple[int, bool]]) -> None:
        self._model = SentencePieceProcessor(model_proto=proto)
        # The same model without the space in front, for text that follows a special token: in a protobuf, a field
        # that is written again overrides what stood before.
        self._model_inside = SentencePieceProcessor(model_proto=proto + proto_field(3, proto_field(3, False)))
        ids = range(self._model.get_piece_size())
        controls = [i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)]
        self._added = {self._model.id_to_piece(i): (i, True) for i in controls} | dict(added)
        self._added_by_id = {i: (text, is_special) for text, (i, is_special) in self._added.items()}
        self._split_all = split_pattern(self._added)
        self._split_plain = split_pattern([text for text, (_, is_special) in self._added.items() if not is_special])
        self._add_bos = settings.config.get("add_bos_token", True) and settings.bos_id is not None
        self._add_eos = settings.config.get("add_eos_token", False)
        self._legacy = settings.config.get("legacy") or False  # transformers' word: a space after every special token
        super().__init__(
            settings,
            vocab_size=max(len(ids), *(i + 1 for i in self._added_by_id)),
            prefix_space=self._model.normalize("a") != self._model_inside.normalize("a"),
        )

    def _encode(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        ids = [self.bos_id] if special and self._add_bos else []
        for i, part in enumerate((self._split_all if parse_special else self._split_plain).split(text)):
            if i % 2:
                ids.append(self._added[part][0])
            elif part:
                ids += (self._model if i == 0 or self._legacy else self._model_inside).encode(part)
        return [*ids, *self.eos_ids[:1]] if special and self._add_eos else ids

    def _token(self, token_id: int) -> tuple[bytes, bool]:
        if not 0 <= token_id < self.vocab_size:
            return b"", False
        text, is_special = self._added_by_id.get(token_id, ("", False))
        if not text and token_id < self._model.get_piece_size():
            text = self._model.id_to_piece(token_id)
            if self._model.is_byte(token_id):
                return bytes.fromhex(text[3:5]), False
        return text.replace("▁", " ").encode(), is_special

    def _save_vocabulary(self, directory: Path) -> dict[str, object]:
        (directory / "tokenizer.model").write_bytes(self._model.serialized_model_proto())
        added = {
            str(i): {"content": text, "special": is_special, "normalized": False}
            for i, (text, is_special) in sorted(self._added_by_id.items())
        }
        own = {"add_bos_token": self._add_bos, "add_eos_token": self._add_eos, "legacy": self._legacy}
        return own | {"added_tokens_decoder": added}


def split_pattern(texts: Sequence[str]) -> re.Pattern:
    """Splits a text so that every second part is one of texts, the longest where several match."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


# ---- Hugging Face directories ------------------------------------------------------------------------------------


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a directory in HF layout: tokenizer.json if it is there, else tokenizer.model."""
    directory = Path(directory)
    config = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    texts = {role: token_text(config[role]) for role in TOKEN_ROLES if config.get(role)}
    added = {token_text(token): (i, True) for token, i in read_json(directory / "added_tokens.json").items()}
    for i, token in config.get("added_tokens_decoder", {}).items():
        added[token_text(token)] = (int(i), token.get("special", False))

    if (path := directory / "tokenizer.json").is_file():
        with readable(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
        backend.add_tokens(
            [
                AddedToken(text, special=special)
                for text, (_, special) in added.items()
                if backend.token_to_id(text) is None
            ]
        )
        ids = {role: backend.token_to_id(text) for role, text in texts.items()}
        build = functools.partial(BPETokenizer, backend)
    elif (path := directory / "tokenizer.model").is_file():
        with readable(path):
            proto = path.read_bytes()
            model = SentencePieceProcessor(model_proto=proto)
        own = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
        texts = {role: model.id_to_piece(i) for role, i in own.items() if i >= 0} | texts
        known = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
        known |= {text: i for text, (i, _) in added.items()}
        ids = {role: known.get(text) for role, text in texts.items()}
        build = functools.partial(SentencePieceTokenizer, proto, added=added)
        config = {"tokenizer_class": "LlamaTokenizer"} | config
    else:
        raise FileNotFoundError(
            f"no tokenizer.json and no tokenizer.model in {directory}: copy the one of this checkpoint there"
        )
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    return build(
        settings=Settings(
            bos_id=bos,
            eos_ids=() if eos is None else (eos,),
            chat_template=find_chat_template(directory, config),
            special_tokens=texts,
            config=config,
        )
    )


def token_text(token: str | dict) -> str:
    """A token in a JSON file is its text, or an object that holds it."""
    return token["content"] if isinstance(token, dict) else token


def find_chat_template(directory: Path, config: Mapping[str, object]) -> str | None:
    """chat_template.jinja where there is one, else the config's: one template, or a list of named ones."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    with readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def readable(what: object) -> Iterator[None]:
    """Turns the failure of a library that reads a file into one line."""
    try:
        yield
    except Exception as error:  # `tokenizers` raises plain Exception for every defect
        raise ValueError(f"{what} is damaged ({one_line(error)}): fetch it again") from None


# ---- GGUF --------------------------------------------------------------------------------------------------------

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What `tokenizer.ggml.pre` names: regular expressions that split the text one after the other, each match on its own.
# "default" is what llama.cpp does with a file that names none.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (r"\p{N}", GPT2_SPLIT),
    "llama-bpe": (LLAMA3_SPLIT,),
    "smaug-bpe": (LLAMA3_SPLIT,),
    "qwen2": (QWEN2_SPLIT,),
    "deepseek-r1-qwen": (QWEN2_SPLIT,),
    "tekken": (TEKKEN_SPLIT,),
}
WHOLE_WORDS_FIRST = {"llama-bpe", "tekken"}  # a word that is a token is taken before any merge, and BOS is added
NFC_NORMALIZED = {"qwen2"}


def bytes_of_chars() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = bytes_of_chars()
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that GGUF metadata describes: key -> plain Python value."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = ggml.get("model")
    needed = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores")}
    if kind not in needed:
        raise ValueError(f"tokenizer.ggml.model is {kind!r}: supported are {', '.join(needed)}; use another GGUF file")
    for key in needed[kind]:
        if not len(ggml.get(key, ())):
            raise ValueError(f"the GGUF metadata lacks tokenizer.ggml.{key}: convert the model to GGUF again")
    tokens = ggml["tokens"]
    ggml.setdefault("token_type", [NORMAL] * len(tokens))
    for key in {"scores", "token_type"} & ggml.keys():
        if len(ggml[key]) != len(tokens):
            raise ValueError(
                f"tokenizer.ggml.{key} has {len(ggml[key])} entries for {len(tokens)} tokens: convert the model again"
            )
    if kind == "llama":  # the format's defaults
        ggml = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | ggml
    names = ("bos", "eos", "unknown", "padding", "eot", "eom")
    ids = {name: int(ggml[f"{name}_token_id"]) for name in names if ggml.get(f"{name}_token_id") is not None}
    for name, i in ids.items():
        if not 0 <= i < len(tokens):
            raise ValueError(
                f"tokenizer.ggml.{name}_token_id is {i}, but there are {len(tokens)} tokens: convert the model again"
            )
    roles = zip(TOKEN_ROLES, ("bos", "eos", "unknown", "padding"), strict=True)
    adds_bos = kind == "llama" or ggml.get("pre") in WHOLE_WORDS_FIRST
    settings = Settings(
        bos_id=ids.get("bos"),
        eos_ids=tuple(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids)),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={role: tokens[ids[name]] for role, name in roles if name in ids},
        config={
            "tokenizer_class": "LlamaTokenizer" if kind == "llama" else "PreTrainedTokenizerFast",
            "add_bos_token": bool(ggml.get("add_bos_token", adds_bos)),
            "add_eos_token": bool(ggml.get("add_eos_token", False)),
        },
    )
    return (sentencepiece_from_gguf if kind == "llama" else byte_level_from_gguf)(ggml, settings)


def byte_level_from_gguf(ggml: dict, settings: Settings) -> Tokenizer:
    pre = ggml.get("pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}: supported are {', '.join(PRE_TOKENIZERS)}; "
            "use the model's HF directory instead of this GGUF file"
        )
    vocab = {token: i for i, token in enumerate(ggml["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in ggml["merges"]]
    with readable("the GGUF file's vocabulary"):
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    if pre in NFC_NORMALIZED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=bool(ggml.get("add_space_prefix", False)), use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(ggml["tokens"], ggml["token_type"], strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    return BPETokenizer(backend, settings)


def sentencepiece_from_gguf(ggml: dict, settings: Settings) -> Tokenizer:
    """GGUF keeps a SentencePiece model's pieces, scores and types: write the model again and let its library encode."""
    tokens, unk = ggml["tokens"], ggml["unknown_token_id"]
    # The library wants exactly one unknown token; some converters give that type to others, or another to it.
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in ggml["token_type"]]
    kinds[unk] = UNKNOWN
    pieces = zip(tokens, ggml["scores"], kinds, strict=True)
    proto = b"".join(proto_field(1, proto_fields({1: p.encode(), 2: float(s), 3: int(k)})) for p, s, k in pieces)
    trainer = {3: 2, 4: len(tokens), 35: BYTE in kinds, 40: unk, 45: tokens[unk].encode()}  # model_type 2 is BPE
    for id_field, text_field, name in ((41, 46, "bos"), (42, 47, "eos")):
        token_id = ggml[f"{name}_token_id"]
        trainer |= {id_field: token_id, text_field: tokens[token_id].encode()}
    prefix_space, strip = bool(ggml.get("add_space_prefix", True)), bool(ggml.get("remove_extra_whitespaces", False))
    normalizer = {1: b"identity", 3: prefix_space, 4: strip, 5: True}
    proto += proto_field(2, proto_fields(trainer)) + proto_field(3, proto_fields(normalizer))
    settings.config["legacy"] = True  # llama.cpp puts a space after every special token
    added = {token: (i, False) for i, token in enumerate(tokens) if kinds[i] == USER_DEFINED}
    with readable("the GGUF file's vocabulary"):
        return SentencePieceTokenizer(proto, settings, added=added)


def proto_fields(values: Mapping[int, int | float | bytes]) -> bytes:
    return b"".join(proto_field(number, value) for number, value in values.items())


def proto_field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message, by its wire format; the numbers are those of sentencepiece_model.proto."""
    if isinstance(value, bytes):
        return proto_varint(number << 3 | 2) + proto_varint(len(value)) + value
    if isinstance(value, float):
        return proto_varint(number << 3 | 5) + struct.pack("<f", value)
    return proto_varint(number << 3) + proto_varint(value)


def proto_varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


# ---- Chat templates ----------------------------------------------------------------------------------------------


class TemplateSandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: object, attribute: str) -> None:
        # jinja2 would print such an attribute as empty text and complain only when it is used further.
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} object is unsafe")


class TemplateNamespace(Namespace):
    """jinja2's `namespace()` without the names that Python gives a meaning to."""

    def __init__(*args: object, **kwargs: object) -> None:
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            TemplateNamespace.__setitem__(args[0], name, value)

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        Namespace.__setitem__(self, name, value)


class GenerationTag(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for training: here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration is a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def template_sandbox() -> TemplateSandbox:
    """The environment that transformers gives chat templates."""
    extensions = ["jinja2.ext.loopcontrols", GenerationTag]
    sandbox = TemplateSandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": TemplateNamespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # not the type, whose attributes lead further
    }
    return sandbox


def render_template(template: str, variables: Mapping[str, object]) -> str:
    size = len(template.encode())
    if size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"the chat template has {size} bytes, more than {MAX_TEMPLATE_BYTES}: leave out --chat")
    try:
        return template_sandbox().from_string(template).render(variables)
    except SecurityError as error:
        raise ValueError(f"chat template refused: {one_line(error)}; leave out --chat or mend the template") from None
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"chat template failed: {one_line(error)}; check the messages or leave out --chat") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
