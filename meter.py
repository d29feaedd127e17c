"""A run's figures: what was generated how fast, and what share of its memory's speed that means for a device."""

import time
from collections.abc import Iterator, Sequence

import torch

import checkpoint
import hardware
from generator import Generator, Request


class Meter:
    """Clocks over groups of requests: time to the first token, and what the decode steps after it moved."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.prompt_tokens = self.new_tokens = 0
        self.ttft_s: list[float] = []
        self.decode_s = self.decode_tokens = self.decode_bytes = 0.0

    def run(self, requests: Sequence[Request]) -> Iterator[Request]:
        """`Generator.run`, measured."""
        start, first = time.perf_counter(), None
        try:
            for request in self.generator.run(requests):
                first = first or time.perf_counter()
                yield request
        finally:
            end = time.perf_counter()
            tokens = [len(r.token_ids) for r in requests]
            if first is not None:
                self.prompt_tokens += sum(len(r.prompt) for r in requests)
                self.new_tokens += sum(tokens)
                steps = max(max(tokens) - 1, 0)  # a group goes on until its longest answer ends
                live = max(len(r.prompt) for r in requests) + steps // 2
                self.ttft_s.append(first - start)
                self.decode_s += end - first
                self.decode_tokens += max(sum(tokens) - len(tokens), 0)
                self.decode_bytes += steps * self.generator.step_bytes(live, len(requests))

    def stats(self, *, load_s: float, compile_s: float, quantize: str | None = None) -> dict:
        return run_stats(
            self.generator.device,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            ttft_s=self.ttft_s,
            decode_tok_s=self.decode_tokens / self.decode_s if self.decode_s else 0.0,
            bytes_per_s=self.decode_bytes / self.decode_s if self.decode_s else 0.0,
            compile_s=compile_s,
            load_s=load_s,
            dtype=str(self.generator.cache.layers[0].dtype).removeprefix("torch."),
            quantize=quantize,
            kv_dtype=self.generator.kv_dtype,
        )


def run_stats(
    device: torch.device, *, prompt_tokens: int, new_tokens: int, ttft_s: Sequence[float], decode_tok_s: float,
    bytes_per_s: float, **known: object,
) -> dict:  # fmt: skip
    """A run's stats: its figures, what they mean on this device, and what is `known` of how it was run."""
    peak = hardware.peak_memory_bytes(device)  # before the probe takes more
    bandwidth = hardware.read_bandwidth(device, checkpoint.cache_dir(), seen=bytes_per_s)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_s": sorted(ttft_s)[len(ttft_s) // 2] if ttft_s else None,
        "decode_tok_s": decode_tok_s,
        "decode_gbs": bytes_per_s / 1e9,
        "read_gbs": bandwidth / 1e9,
        "bandwidth_fraction": bytes_per_s / bandwidth,
        "peak_memory_gb": peak / 1e9,
        "device": hardware.device_name(device),
        **known,
    }


def describe(stats: dict) -> str:
    """Stats in one line for people."""
    if not stats["decode_tok_s"]:  # nothing but first tokens, if that
        speed = f"{stats['new_tokens']} new tokens"
    else:
        speed = (
            f"{stats['new_tokens']} new tokens at {stats['decode_tok_s']:.1f} tok/s, {stats['decode_gbs']:.1f} GB/s = "
            f"{stats['bandwidth_fraction']:.0%} of the {stats['read_gbs']:.1f} GB/s that this device reads"
        )
    ttft = f"{stats['ttft_s'] * 1e3:.0f} ms" if stats["ttft_s"] is not None else "none"
    return (
        f"{stats['prompt_tokens']} prompt tokens, first token after {ttft}; {speed}; load {stats['load_s']:.1f} s, "
        f"compile {stats['compile_s']:.1f} s, peak memory {stats['peak_memory_gb']:.2f} GB; "
        f"{weights_of(stats)} on {stats['device']}"
    )


def weights_of(stats: dict) -> str:
    """What the weights and the cache are stored in, for people."""
    parts = [f"{stats[name]} {what}" for name, what in (("quantize", "weights"), ("kv_dtype", "cache")) if stats[name]]
    return f"{', '.join(parts)}, else {stats['dtype']}" if parts else stats["dtype"]
