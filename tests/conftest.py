"""Fixtures: tiny random models, ours and transformers', and which marked tests can run here.

transformers runs in a subprocess with another working directory: its optional `kernels` package has our folder's name.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # the kernels' own code runs on the CPU; read when a kernel is defined, so set first
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hardware
from cache import StaticCache
from checkpoint import save_model
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much where cores are shared
# A shell lets what it runs in the background ignore Ctrl-C, and programs started by the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    dim=48,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=80,
    vocab_size=131,
    max_seq_len=512,
)


def tiny_model(config: ModelConfig = TINY, *, seed: int = 0, device: str = "cpu", dtype=torch.float32) -> Transformer:
    """A random model whose greedy tokens vary: weights large enough that logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
    model.embed.weight.data.mul_(config.dim**0.5)
    model.requires_grad_(False).eval()
    model.to(dtype)
    model.rope_freqs = Transformer(config).rope_freqs
    return model.to(device)


def new_cache(model: Transformer, *, batch: int, length: int, kv_dtype: str | None = None) -> StaticCache:
    return StaticCache.allocate(
        n_layers=model.config.n_layers,
        batch=batch,
        max_seq_len=length,
        n_kv_heads=model.config.n_kv_heads,
        head_dim=model.config.head_dim,
        dtype=model.norm.weight.dtype,
        device=model.norm.weight.device,
        kv_dtype=kv_dtype,
    )


@pytest.fixture
def rounded_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses a carry where rounding to fp8 reaches a power of two; a GPU does not."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl, convert = interpreter.tl, interpreter._convert_float

    def rounded(x, source, target, mode):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(x, source, target, mode)
        return torch.tensor(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def model() -> Transformer:
    return tiny_model()


# ---- Tiny models that transformers made ------------------------------------------------------------------------------

PROMPT = [3, 17, 42, 9, 88, 5, 61, 30, 12, 77, 4, 19, 54, 2, 36, 71]

NEW = 16  # tokens that parity tests decode after each prompt
ROWS = [[(7 * i * i + 5 * i + n) % 96 for i in range(n + NEW)] for n in (3, 11, 24)]  # a prompt and what follows it

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
MODELS = {  # name: (architecture, what differs from SMALL)
    "llama2": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "eos_token_id": [2, 5]}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR, "head_dim": 24}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 32}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3-untied": ("SmolLM3", {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 6}),
}

MAKE = """
import json, sys, torch, transformers
torch.set_num_threads(1)
models, small, prompt, rows = json.load(open("spec.json"))
logits, row_logits = {}, {}
for i, (name, (family, changes)) in enumerate(models.items()):
    torch.manual_seed(i)
    config = getattr(transformers, family + "Config")(**{**small, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, family + "ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # larger than the default, so that mistakes show
            if key.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.15)
        logits[name] = model(torch.tensor([prompt])).logits[0].clone()
        row_logits[name] = [model(torch.tensor([row])).logits[0].clone() for row in rows]
    model.save_pretrained(name, max_shard_size="40KB" if name in ("llama2", "qwen3") else "1GB")
torch.save(logits, "logits.pt")
torch.save(row_logits, "row_logits.pt")
"""


def run_transformers(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """A folder with one tiny directory per model, written by transformers, and their logits on PROMPT and ROWS."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "spec.json").write_text(json.dumps([MODELS, SMALL, PROMPT, ROWS]))
    run_transformers(MAKE, folder)
    return folder


# ---- What the command line needs -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory) -> Path:
    """A tiny model in Hugging Face layout, with a tokenizer and a chat template."""
    from tests.test_tokenizer import TEMPLATE, byte_level_backend  # one copy of how a tokenizer is trained

    folder = tmp_path_factory.mktemp("tiny")
    byte_level_backend("smollm").save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, max_seq_len=4096)
    save_model(tiny_model(config), folder / "model", tokenizer=tokenizer)
    return folder / "model"


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    """A folder for $TACHYON_CACHE that knows this machine's bandwidth already: no test waits for the probe."""
    folder = tmp_path_factory.mktemp("cache")
    key = hardware.bandwidth_key(torch.device("cpu"))
    (folder / "bandwidth.json").write_text(json.dumps({key: 1e12}))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if item.get_closest_marker("network") and os.environ.get("TACHYON_OFFLINE"):
            item.add_marker(pytest.mark.skip(reason="TACHYON_OFFLINE is set"))
