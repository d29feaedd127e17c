"""Fixtures: tiny random models, and which marked tests can run here."""

import os

import pytest
import torch

from model import ModelConfig, Transformer

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


@pytest.fixture
def model() -> Transformer:
    return tiny_model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
        if "network" in item.keywords and os.environ.get("TACHYON_OFFLINE"):
            item.add_marker(pytest.mark.skip(reason="TACHYON_OFFLINE is set"))
