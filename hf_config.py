"""A Hugging Face config.json as a `ModelConfig`, and back; and the configs of well-known models.

Each architecture has one small function for what it says in its own way; everything else is common. Both spellings
are read: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before). What the model cannot do
is refused here by its name in the file, so nothing is silently ignored. This file reads no files and no weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model import ModelConfig, RopeScaling

# ---- Names -----------------------------------------------------------------------------------------------------------

_MODULES = {  # our module: the modules in Hugging Face's layout whose rows it holds, in order
    "embed": ("model.embed_tokens",),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "layers.{}.attention.qkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
    "layers.{}.attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "layers.{}.attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "layers.{}.attention.o": ("model.layers.{}.self_attn.o_proj",),
    "layers.{}.ffn_norm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.ffn.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "layers.{}.ffn.down": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
_OURS = {part: module for module, parts in _MODULES.items() for part in parts}


def hf_modules(module: str) -> tuple[str, ...]:
    """The modules in Hugging Face's layout whose rows our `module` holds, in order."""
    layer = re.search(r"\d+", module)
    parts = _MODULES.get(re.sub(r"\d+", "{}", module))
    if parts is None:
        raise ValueError(f"{module} has no name in Hugging Face's layout")
    return tuple(part.format(layer and layer[0]) for part in parts)


def our_module(name: str) -> str | None:
    """Our module that holds the rows of Hugging Face's; None if the models here have none of that name."""
    layer = re.search(r"\d+", name)
    module = _OURS.get(re.sub(r"\d+", "{}", name))
    return module and module.format(layer and layer[0])


# ---- config.json -----------------------------------------------------------------------------------------------------


def _llama(raw: Mapping, n_layers: int) -> dict:
    bias = bool(raw.get("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias, "ffn_bias": bool(raw.get("mlp_bias"))}


def _mistral(raw: Mapping, n_layers: int) -> dict:
    window = raw.get("sliding_window", 4096)  # a key that is not there means the architecture's first value
    return {"sliding_window": window, "sliding_layers": tuple(range(n_layers))} if window else {}


def _sliding(raw: Mapping, default: Sequence[int]) -> dict:
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = raw.get("layer_types")
    layers = tuple(default) if types is None else tuple(i for i, x in enumerate(types) if x == "sliding_attention")
    return {"sliding_window": window, "sliding_layers": layers} if window and layers else {}


def _qwen2(raw: Mapping, n_layers: int) -> dict:
    return {"qkv_bias": True, **_sliding(raw, range(raw.get("max_window_layers", 28), n_layers))}


def _qwen3(raw: Mapping, n_layers: int) -> dict:
    bias = bool(raw.get("attention_bias"))
    sliding = _sliding(raw, range(raw.get("max_window_layers", 28), n_layers))
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias, **sliding}


def _smollm3(raw: Mapping, n_layers: int) -> dict:
    uses_rope = raw.get("no_rope_layers")  # 1 where rotary embedding is used, whatever the name says
    if uses_rope is None:
        interval = raw.get("no_rope_layer_interval", 4)
        uses_rope = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    if len(uses_rope) < n_layers:
        raise ValueError(f"no_rope_layers has {len(uses_rope)} entries for {n_layers} layers; complete config.json")
    without = tuple(layer for layer in range(n_layers) if not uses_rope[layer])
    return {"no_rope_layers": without, **_llama(raw, n_layers), **_sliding(raw, without)}


_ARCHITECTURES: dict[str, Callable[[Mapping, int], dict]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "SmolLM3ForCausalLM": _smollm3,
}


def read_config(raw: Mapping, file: Path) -> ModelConfig:
    """A config.json, in the form of any version of transformers, as ours; `file` is for messages."""
    architecture = (raw.get("architectures") or [None])[0]
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"{file}: architecture {architecture!r} is unknown; supported: {', '.join(_ARCHITECTURES)}")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"{file}: hidden_act {activation!r} is not supported; only silu is")

    def size(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{file} has no {key!r}; complete it from the model's source")
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{file}: {key!r} is {value!r}; it must be a positive whole number")
        return value

    dim, n_layers, n_heads = size("hidden_size"), size("num_hidden_layers"), size("num_attention_heads")
    n_kv_heads, max_seq_len = size("num_key_value_heads", n_heads), size("max_position_embeddings")
    if n_heads % n_kv_heads:
        raise ValueError(f"{file}: num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}")
    rope_theta, rope_scaling = _read_rope(raw, file, max_seq_len)
    return ModelConfig(
        architecture=architecture,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=size("head_dim", dim // n_heads),
        ffn_dim=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        max_seq_len=max_seq_len,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied_head=bool(raw.get("tie_word_embeddings", architecture == "SmolLM3ForCausalLM")),
        **_ARCHITECTURES[architecture](raw, n_layers),
    )


def _read_rope(raw: Mapping, file: Path, max_seq_len: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{file}: rope parameters that differ between layers ({', '.join(rope)}) are not supported")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"{file}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"{file}: partial_rotary_factor other than 1 is not supported")
    required = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    for key in required:
        if rope.get(key) is None:
            raise ValueError(f"{file}: rope type {kind!r} has no {key!r}; complete it from the model's source")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=float(rope["factor"]))
    return theta, RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_seq_len=int(rope.get("original_max_position_embeddings") or max_seq_len),
    )


def hf_config(config: ModelConfig) -> dict:
    """`config` as a config.json that `read_config` and every version of transformers understand."""
    raw = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.o_bias,
        "mlp_bias": config.ffn_bias,
    }
    if scaling := config.rope_scaling:
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            raw["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
    if config.architecture == "MistralForCausalLM":
        raw["sliding_window"] = config.sliding_window
    elif config.architecture != "LlamaForCausalLM":
        sliding = [config.sliding_window is not None and i in config.sliding_layers for i in range(config.n_layers)]
        raw["use_sliding_window"] = any(sliding)
        raw["sliding_window"] = config.sliding_window
        raw["layer_types"] = ["sliding_attention" if x else "full_attention" for x in sliding]
    if config.architecture == "SmolLM3ForCausalLM":
        raw["no_rope_layers"] = [int(i not in config.no_rope_layers) for i in range(config.n_layers)]
    return raw


# ---- Presets ---------------------------------------------------------------------------------------------------------


def _preset(architecture: str, dim: int, n_layers: int, heads: tuple[int, int, int], ffn: int, **more) -> ModelConfig:
    n_heads, n_kv_heads, head_dim = heads
    return ModelConfig(
        architecture=architecture + "ForCausalLM",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=ffn,
        **more,
    )


_LLAMA3 = {"vocab_size": 128256, "max_seq_len": 131072, "rope_theta": 5e5}
_LLAMA31 = {**_LLAMA3, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)}
_LLAMA32 = {**_LLAMA3, "rope_scaling": RopeScaling(kind="llama3", factor=32.0), "tied_head": True}
_QWEN = {"vocab_size": 151936, "norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3 = {**_QWEN, "max_seq_len": 40960, "qk_norm": True}

PRESETS = {  # architecture, dim, layers, (heads, key/value heads, head dim), feed-forward dim
    "llama-2-7b": _preset("Llama", 4096, 32, (32, 32, 128), 11008, vocab_size=32000, max_seq_len=4096),
    "llama-3.1-8b": _preset("Llama", 4096, 32, (32, 8, 128), 14336, **_LLAMA31),
    "llama-3.2-1b": _preset("Llama", 2048, 16, (32, 8, 64), 8192, **_LLAMA32),
    "llama-3.2-3b": _preset("Llama", 3072, 28, (24, 8, 128), 8192, **_LLAMA32),
    "mistral-7b": _preset(  # version 0.3, which has no sliding window
        "Mistral", 4096, 32, (32, 8, 128), 14336, vocab_size=32768, max_seq_len=32768, rope_theta=1e6
    ),
    "qwen2.5-0.5b": _preset(
        "Qwen2", 896, 24, (14, 2, 64), 4864, max_seq_len=32768, qkv_bias=True, tied_head=True, **_QWEN
    ),
    "qwen3-0.6b": _preset("Qwen3", 1024, 28, (16, 8, 128), 3072, tied_head=True, **_QWEN3),
    "qwen3-8b": _preset("Qwen3", 4096, 36, (32, 8, 128), 12288, **_QWEN3),
    "smollm2-135m": _preset(
        "Llama", 576, 30, (9, 3, 64), 1536, vocab_size=49152, max_seq_len=8192, rope_theta=1e5, tied_head=True
    ),
    "smollm3-3b": _preset(
        "SmolLM3",
        2048,
        36,
        (16, 4, 128),
        11008,
        vocab_size=128256,
        max_seq_len=65536,
        norm_eps=1e-6,
        rope_theta=5e6,
        no_rope_layers=tuple(range(3, 36, 4)),
        tied_head=True,
    ),
}
