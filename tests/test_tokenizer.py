"""Tokenizers are held against the libraries they come from, on tiny vocabularies trained here."""

import importlib.util
import json
import random
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from tokenizer import (
    BYTE_OF_CHAR,
    LLAMA3_SPLIT,
    MAX_TEMPLATE_BYTES,
    PRE_TOKENIZERS,
    load_tokenizer,
    tokenizer_from_gguf,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It isn't what we'd expect, is it?",
    "In 1984 there were 1234567 people; 3.14 is pi, and 100% of them were here.",
    "def main(argv):\n    for i in range(10):\n        print(f'{i}\\t{argv[i]}')\n\n\nmain()\n",
    "Ünïcödé schöne Straße, naïve café, Привет мир, 你好世界, こんにちは, 👩‍👩‍👧‍👦 🦙 🚀",
    "the the the there then these those other others mother brother   and   spaces",
] * 20

AWKWARD = [
    "",
    " ",
    "    ",
    "\n",
    "\n\n  \n",
    "\t\t x",
    " leading",
    "trailing ",
    "a\r\nb",
    "\u0000",
    "a\u0000b",
    "👩‍👩‍👧‍👦 family",
    "e\u0301 combining",
    "你好世界",
    "مرحبا بالعالم",
    "12345 ½ ²",
    "it's IT'S we'Ll",
    "<0x0A> Ġ",
    "x" * 10_000,
    "\U0010ffff\ufffd",
]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello <b>there</b>"}]


def byte_level_backend(pre: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if pre == "smollm":  # as SmolLM2's own tokenizer.json writes it
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        (pattern,) = PRE_TOKENIZERS[pre]
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=sorted(BYTE_OF_CHAR), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def byte_level_metadata(backend: tokenizers.Tokenizer, pre: str) -> dict[str, object]:
    model = json.loads(backend.to_str())["model"]
    ids = backend.get_vocab(with_added_tokens=True)
    kinds = {token: 3 for token in SPECIAL} | {"<think>": 4}
    tokens = sorted(ids, key=ids.get)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.fixture(scope="module")
def bpe_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    byte_level_backend("smollm").save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("spm_model") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="module")
def spm_directory(tmp_path_factory, spm_model):
    directory = tmp_path_factory.mktemp("spm")
    (directory / "tokenizer.model").write_bytes(spm_model.read_bytes())
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 520}))
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def spm_metadata(path) -> dict[str, object]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.get_piece_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    kinds[model.piece_to_id("<|user|>")] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model", "gguf gpt2", "gguf llama"])
def tokenizer(request, bpe_directory, spm_directory, spm_model):
    if request.param == "tokenizer.json":
        return load_tokenizer(bpe_directory)
    if request.param == "tokenizer.model":
        return load_tokenizer(spm_directory)
    if request.param == "gguf gpt2":
        return tokenizer_from_gguf(byte_level_metadata(byte_level_backend("llama-bpe"), "llama-bpe"))
    return tokenizer_from_gguf(spm_metadata(spm_model))


def with_transformers(script: str, payload: object, cwd) -> object:
    """Runs script, which makes `result` of `payload`, away from this repository's `kernels` folder."""
    code = f"import json, sys\npayload = json.load(sys.stdin)\n{script}\nprint('RESULT' + json.dumps(result))"
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(payload), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.split("RESULT", 1)[1])


# ---- Encoding and decoding


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:12]))
def test_decode_gives_back_the_encoded_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


def test_special_tokens_in_text_are_parsed_only_when_asked(tokenizer):
    name = tokenizer.settings.special_tokens["eos_token"]
    parsed = tokenizer.encode(f"a{name}b", special=False, parse_special=True)
    plain = tokenizer.encode(f"a{name}b", special=False)
    assert parsed.count(tokenizer.eos_ids[0]) == 1
    assert tokenizer.eos_ids[0] not in plain
    assert tokenizer.decode(plain) == f"a{name}b"
    assert tokenizer.decode(parsed) in ("ab", "a b")  # SentencePiece's older way puts a space after a special token
    assert name in tokenizer.decode(parsed, skip_special=False)


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("hi", special=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 7, -1]) == "hi"


def test_a_lone_surrogate_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d b")) == "a\ufffd b"


def test_byte_level_decoding_equals_the_library_on_random_ids(bpe_directory):
    ours = load_tokenizer(bpe_directory)
    reference = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(30))]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)


def test_sentencepiece_ids_equal_the_library(spm_directory, spm_model):
    ours = load_tokenizer(spm_directory)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    for text in AWKWARD + CORPUS[:5]:
        assert ours.encode(text, special=False) == reference.encode(text), text[:40]
        assert ours.encode(text) == [1, *reference.encode(text)]
    assert ours.bos_id == 1 and ours.eos_ids == (2,)


def test_sentencepiece_splits_on_tokens_added_beside_the_model(spm_directory):
    ours = load_tokenizer(spm_directory)
    assert ours.vocab_size == 521
    ids = ours.encode("hi<|im_end|>you", special=False, parse_special=True)
    assert ids[-2:].count(520) or 520 in ids
    after = ids[ids.index(520) + 1 :]
    assert ours.decode(after, continues=True) == "you"  # no space sneaks in after a special token


def test_add_bos_token_in_the_config_overrules_tokenizer_json(bpe_directory, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((bpe_directory / "tokenizer_config.json").read_text())

    def ids(**extra):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | extra))
        return load_tokenizer(tmp_path).encode("the lazy dog")

    text = load_tokenizer(bpe_directory).encode("the lazy dog")
    assert ids() == [1, *text]  # and the padding and truncation stored in the file are not applied
    assert ids(add_bos_token=False) == text
    assert ids(add_bos_token=True, add_eos_token=True) == [1, *text, 2]


# ---- Streaming


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("continues", [True, False])
def test_streamed_pieces_join_to_the_decoded_text_for_random_ids(tokenizer, skip_special, continues):
    rng = random.Random(1)
    byte_ids = [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i).isascii()]
    words = tokenizer.encode("👩‍👩‍👧‍👦 e\u0301 你好 Привет  two", special=False)
    for _ in range(200):
        pools = [range(tokenizer.vocab_size), byte_ids, words]
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(25))]
        stream = tokenizer.stream(skip_special=skip_special, continues=continues)
        text = "".join([*(stream.push(i) for i in ids), stream.finish()])
        assert text == tokenizer.decode(ids, skip_special=skip_special, continues=continues)


def test_streaming_never_emits_half_a_character(tokenizer):
    text = "a 👩‍👩‍👧‍👦 你好 🦙🚀 e\u0301 end"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text, special=False)]
    assert stream.finish() == ""
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # some character took more than one token, and was held back


def test_an_incomplete_character_is_finished_as_a_replacement_character(tokenizer):
    ids = tokenizer.encode("ok 🫠", special=False)[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "ok "
    assert stream.finish() == "\ufffd"


def test_streaming_keeps_the_space_before_every_word(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("the  quick brown fox", special=False)
    assert "".join(stream.push(i) for i in ids) == "the  quick brown fox"


def test_text_that_continues_a_prompt_keeps_its_first_space(tokenizer):
    ids = tokenizer.encode("brown fox", special=False)
    both = tokenizer.encode("quick brown fox", special=False)
    rest = both[len(tokenizer.encode("quick", special=False)) :]
    assert tokenizer.decode(rest, continues=True) == " brown fox"
    assert tokenizer.decode(ids) == "brown fox"


# ---- GGUF


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_gguf_byte_level_vocabulary_gives_the_ids_of_the_original(pre):
    backend = byte_level_backend(pre)
    ours = tokenizer_from_gguf(byte_level_metadata(backend, pre))
    assert ours.vocab_size == backend.get_vocab_size()
    assert (ours.bos_id, ours.eos_ids, ours.chat_template) == (1, (2,), TEMPLATE)
    for text in [*AWKWARD, *CORPUS[:5], "<|im_start|>user\nhi <think>x<|im_end|>"]:
        if pre == "qwen2" and "\u0301" in text:
            continue  # Qwen's own tokenizer composes characters (NFC), the backend trained here does not
        ids = ours.encode(text, special=False, parse_special=True)
        if pre in ("llama-bpe", "tekken"):  # these take a word that is a token before any merge
            assert ours.decode(ids, skip_special=False) == text
        else:
            assert ids == backend.encode(text, add_special_tokens=False).ids, text[:40]


def test_gguf_pre_tokenizers_differ_where_the_models_do():
    base = byte_level_metadata(byte_level_backend("gpt-2"), "gpt-2")
    tokens = [*base["tokenizer.ggml.tokens"], "78", "zqzq"]
    base |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [*base["tokenizer.ggml.token_type"], 1, 1]}
    base["tokenizer.ggml.merges"] = [*base["tokenizer.ggml.merges"], "7 8"]

    def ids(pre, text):
        return tokenizer_from_gguf(base | {"tokenizer.ggml.pre": pre}).encode(text, special=False)

    pair, word = len(tokens) - 2, len(tokens) - 1
    assert ids("gpt-2", "78") == ids("llama-bpe", "78") == [pair]
    assert len(ids("smollm", "78")) == len(ids("qwen2", "78")) == 2  # these take digits one by one
    assert ids("llama-bpe", "zqzq") == [word]  # a token no merge leads to
    assert word not in ids("gpt-2", "zqzq")
    assert ids("qwen2", "e\u0301") == ids("qwen2", "é")  # Qwen composes characters (NFC)
    assert ids("gpt-2", "e\u0301") != ids("gpt-2", "é")


def test_gguf_says_whether_bos_is_added():
    metadata = byte_level_metadata(byte_level_backend("gpt-2"), "gpt-2")
    plain = tokenizer_from_gguf(metadata).encode("the fox")
    assert 1 not in plain
    assert tokenizer_from_gguf(metadata | {"tokenizer.ggml.add_bos_token": True}).encode("the fox") == [1, *plain]
    llama = tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    assert llama.encode("the fox")[0] == 1
    ends = tokenizer_from_gguf(metadata | {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 2})
    assert ends.eos_ids == (2, 0)


def test_gguf_sentencepiece_vocabulary_gives_the_ids_of_the_original(spm_model):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spm_model))
    ours = tokenizer_from_gguf(spm_metadata(spm_model))
    for text in [*AWKWARD, *CORPUS[:5]]:
        assert ours.encode(text) == [1, *reference.encode(text)], text[:40]
    spaceless = tokenizer_from_gguf(spm_metadata(spm_model) | {"tokenizer.ggml.add_space_prefix": False})
    assert spaceless.encode("the", special=False) != ours.encode("the", special=False)
    assert spaceless.decode(spaceless.encode(" the")) == " the"


def test_gguf_user_defined_tokens_are_always_parsed(spm_model):
    ours = tokenizer_from_gguf(spm_metadata(spm_model))
    user = next(i for i in range(ours.vocab_size) if ours.token_bytes(i) == b"<|user|>")
    assert ours.encode("<|user|>", special=False) == [user]


def test_gguf_vocabulary_that_types_unknown_oddly_still_loads(spm_model):
    metadata = spm_metadata(spm_model)
    kinds = metadata["tokenizer.ggml.token_type"]
    kinds[0], kinds[-1] = 3, 2  # as some converters write: <unk> as control, padding tokens as unknown
    assert tokenizer_from_gguf(metadata).encode("the", special=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert': supported are gpt2, llama"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon': supported are default, gpt-2, smollm"),
        ({"tokenizer.ggml.merges": []}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["qq zz"]}, "vocabulary is damaged"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.eos_token_id": 99999}, "eos_token_id is 99999"),
    ],
)
def test_bad_gguf_metadata_is_one_line_with_the_value(change, message):
    metadata = byte_level_metadata(byte_level_backend("gpt-2"), "gpt-2") | change
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(caught.value)


# ---- Files


def test_a_directory_without_a_tokenizer_says_what_to_add(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no tokenizer.model in .*: copy"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_text("{not this")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_tokenizer(tmp_path)


def test_a_decoder_of_another_kind_is_refused(tmp_path):
    backend = byte_level_backend("gpt-2")
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"decoder \['WordPiece'\]: supported are"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_loaded_as_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for name in ("vocab_size", "bos_id", "eos_ids", "chat_template", "prefix_space"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    name = tokenizer.settings.special_tokens["eos_token"]
    for text in [*AWKWARD, f"a{name} b", "<think><|user|>x"]:
        for parse_special in (True, False):
            ids = tokenizer.encode(text, parse_special=parse_special)
            assert again.encode(text, parse_special=parse_special) == ids
            assert again.decode(ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)


def test_chat_templates_are_found_where_checkpoints_keep_them(bpe_directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((bpe_directory / "tokenizer.json").read_bytes())
    assert load_tokenizer(tmp_path).chat_template is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "plain"
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert load_tokenizer(tmp_path).chat_template == "beside"


def test_special_tokens_are_found_in_special_tokens_map(bpe_directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((bpe_directory / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert load_tokenizer(tmp_path).eos_ids == (2,)


TRANSFORMERS_SCRIPT = """
from transformers import AutoTokenizer
result = {}
for directory in payload["directories"]:
    hf = AutoTokenizer.from_pretrained(directory)
    chats = {}
    for name, template in payload["templates"].items():
        hf.chat_template = template or hf.chat_template
        chats[name] = hf.apply_chat_template(payload["messages"], add_generation_prompt=True, tokenize=False)
    result[directory] = {
        "ids": [hf.encode(text) for text in payload["texts"]],
        "bare": [hf.encode(text, add_special_tokens=False) for text in payload["texts"]],
        "decoded": [hf.decode(hf.encode(text), skip_special_tokens=True) for text in payload["texts"]],
        "chats": chats,
        "bos": hf.bos_token_id, "eos": hf.eos_token_id,
    }
"""
TEMPLATES = {
    "own": None,
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n  {{ m | tojson }}\n  {% endif %}\n{% endfor %}",
    "loop control": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "tools": "{% if tools %}tools{% else %}none{% endif %}{{ strftime_now('%Y') }}{{ dict(a=1) | tojson(indent=2) }}",
}


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="compares with transformers"
)


@needs_transformers
def test_transformers_gives_the_same_ids_texts_and_chats(bpe_directory, tmp_path):
    tokenizers_of = {str(bpe_directory): load_tokenizer(bpe_directory)}
    for pre in ("smollm", "llama-bpe"):  # one that adds no BOS and one that does
        ours = tokenizer_from_gguf(byte_level_metadata(byte_level_backend(pre), pre))
        ours.save(tmp_path / pre)
        tokenizers_of[str(tmp_path / pre)] = ours
    texts = [*AWKWARD, "<|im_start|>user\n hi<|im_end|> <think>x"]
    payload = {"directories": list(tokenizers_of), "templates": TEMPLATES, "texts": texts, "messages": MESSAGES * 2}
    reference = with_transformers(TRANSFORMERS_SCRIPT, payload, tmp_path)
    for directory, ours in tokenizers_of.items():
        theirs = reference[directory]
        assert (ours.bos_id, ours.eos_ids) == (theirs["bos"], (theirs["eos"],))
        for i, text in enumerate(texts):
            assert ours.encode(text, parse_special=True) == theirs["ids"][i], text[:40]
            assert ours.encode(text, special=False, parse_special=True) == theirs["bare"][i], text[:40]
            assert ours.decode(theirs["ids"][i]) == theirs["decoded"][i], text[:40]
        for name, template in TEMPLATES.items():
            ours.chat_template = template or TEMPLATE
            assert ours.render_chat(MESSAGES * 2) == theirs["chats"][name], name


@needs_transformers
@pytest.mark.skipif(
    importlib.util.find_spec("google") is None or importlib.util.find_spec("google.protobuf") is None,
    reason="transformers reads tokenizer.model only with protobuf installed",
)
def test_transformers_loads_a_saved_sentencepiece_model(spm_model, tmp_path):
    ours = tokenizer_from_gguf(spm_metadata(spm_model))
    ours.save(tmp_path / "saved")
    payload = {
        "directories": [str(tmp_path / "saved")],
        "templates": {},
        "texts": CORPUS[:3],
        "messages": MESSAGES,
    }
    (theirs,) = with_transformers(TRANSFORMERS_SCRIPT, payload, tmp_path).values()
    assert (theirs["bos"], theirs["eos"]) == (1, 2)
    for text, ids in zip(CORPUS[:3], theirs["ids"], strict=True):
        assert ours.encode(text) == ids


# ---- Chat templates


def test_chat_parses_the_templates_special_tokens_and_adds_none(bpe_directory):
    ours = load_tokenizer(bpe_directory)
    ids = ours.chat(MESSAGES)
    assert ours.decode(ids, skip_special=False) == (
        "<|im_start|>user\nHello <b>there</b><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 2 and ids.count(2) == 1
    assert ours.chat(MESSAGES, add_generation_prompt=False) == ids[: len(ids) - len(ours.encode("assistant\n")) - 1]


def test_kwargs_are_the_templates_variables(bpe_directory):
    ours = load_tokenizer(bpe_directory)
    ours.chat_template = "{{ enable_thinking }}{{ undefined_name }}"
    assert ours.render_chat(MESSAGES, enable_thinking=False) == "False"


def test_without_a_template_the_remedy_is_named(spm_model):
    with pytest.raises(ValueError, match="no chat template: leave out --chat"):
        tokenizer_from_gguf(spm_metadata(spm_model)).chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ messages.__init__ }}",
        "{{ messages[0]['__class__'] | attr('__class__') }}",
        "{{ (messages | map(attribute='__class__') | list)[0] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ namespace(**{'__call__': 1}) }}",
        "{{ dict.__code__ }}",
    ],
)
def test_a_template_that_reaches_for_python_internals_is_refused(bpe_directory, template):
    ours = load_tokenizer(bpe_directory)
    ours.chat_template = template
    with pytest.raises(ValueError, match=r"^chat template refused: ") as caught:
        ours.render_chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "endfor"),
        ("{{ messages[0].name.first }}", "has no attribute 'name'"),
        ("{% for i in range(10000000000) %}{% endfor %}", "[Rr]ange"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages + 1 }}", "can only concatenate"),
    ],
)
def test_a_template_that_fails_is_one_line(bpe_directory, template, message):
    ours = load_tokenizer(bpe_directory)
    ours.chat_template = template
    with pytest.raises(ValueError, match=f"^chat template failed: .*{message}") as caught:
        ours.render_chat(MESSAGES)
    assert "\n" not in str(caught.value)


def test_a_huge_template_is_refused(bpe_directory):
    ours = load_tokenizer(bpe_directory)
    ours.chat_template = "x" * (MAX_TEMPLATE_BYTES + 1)
    with pytest.raises(ValueError, match=f"has {MAX_TEMPLATE_BYTES + 1} bytes"):
        ours.render_chat(MESSAGES)


def test_llama3_pattern_groups_digits_by_three():
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    assert [text for text, _ in split.pre_tokenize_str("1234567 it'S")] == ["123", "456", "7", " it", "'S"]
