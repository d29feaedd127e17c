"""The built-in model in fp32 against transformers, which loads the copy that save_model wrote."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoint import DEFAULT_CHECKPOINT, load_model, open_checkpoint, save_model
from generator import Generator, Request
from scripts import evaluate
from tests.conftest import run_transformers

pytestmark = pytest.mark.network

TEXT = Path(__file__).parent / "data" / "prose.txt"
PROMPTS, LENGTH, NEW = 10, 48, 48
CONTEXT, WINDOWS = 256, 4

REFERENCE = """
import json, torch, transformers
prompts, length, new, context, windows, threads = json.load(open("spec.json"))
torch.set_num_threads(threads)
text = open("prose.txt", encoding="utf-8", newline="").read()
ids = transformers.AutoTokenizer.from_pretrained("model")(text, return_tensors="pt").input_ids[0]
model = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
batch = torch.stack([ids[i * 2 * length :][:length] for i in range(prompts)])
out = model.generate(
    batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=new, min_new_tokens=new,
    pad_token_id=0, output_logits=True, return_dict_in_generate=True,
)
best = torch.stack(out.logits, dim=1).topk(2).values  # [prompts, new, 2]
nll = 0.0
with torch.no_grad():
    for i in range(windows):
        window = ids[i * context : (i + 1) * context + 1]
        log_probs = model(window[None, :-1]).logits[0].double().log_softmax(-1)
        nll -= log_probs.gather(-1, window[1:, None]).sum().item()
json.dump(
    {
        "ids": ids.tolist(),
        "prompts": batch.tolist(),
        "answers": out.sequences[:, length:].tolist(),
        "gaps": (best[..., 0] - best[..., 1]).tolist(),
        "nll": nll / (windows * context),
    },
    open("reference.json", "w"),
)
"""


@pytest.fixture(scope="module", autouse=True)
def all_threads() -> Iterator[None]:
    """This model is large enough to gain from them."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def builtin(all_threads):
    source = open_checkpoint(DEFAULT_CHECKPOINT)
    return source, load_model(source, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(builtin, tmp_path_factory) -> dict:
    folder, (source, model) = tmp_path_factory.mktemp("parity"), builtin
    save_model(model, folder / "model", eos_ids=source.eos_ids, tokenizer=source.tokenizer)
    (folder / "prose.txt").write_bytes(TEXT.read_bytes())
    spec = [PROMPTS, LENGTH, NEW, CONTEXT, WINDOWS, torch.get_num_threads()]
    (folder / "spec.json").write_text(json.dumps(spec))
    run_transformers(REFERENCE, folder)
    return json.loads((folder / "reference.json").read_text())


def test_the_text_has_the_tokens_of_transformers(builtin, reference):
    assert builtin[0].tokenizer.encode(TEXT.read_text(encoding="utf-8")) == reference["ids"]


@pytest.mark.parametrize(("batch", "count"), [(PROMPTS, PROMPTS), (1, 3)])
def test_greedy_tokens_are_those_of_transformers(builtin, reference, batch, count):
    generator = Generator(builtin[1], max_seq_len=LENGTH + NEW, batch_size=batch)
    requests = [Request(prompt=prompt, max_new_tokens=NEW) for prompt in reference["prompts"][:count]]
    for begin in range(0, count, batch):
        for _ in generator.run(requests[begin : begin + batch]):
            pass
    for request, expected, gaps in zip(requests, reference["answers"], reference["gaps"], strict=False):
        assert len(request.prompt) == LENGTH and len(request.token_ids) == NEW
        differ = [i for i in range(NEW) if request.token_ids[i] != expected[i]]
        assert not differ or gaps[differ[0]] < 1e-3, (differ[0], request.token_ids, expected)


def test_perplexity_is_that_of_transformers(reference):
    result = evaluate.evaluate(
        evaluate.Options(text=TEXT, context=CONTEXT, windows=WINDOWS, batch=2, dtype="float32", device="cpu")
    )
    expected = torch.tensor(reference["nll"], dtype=torch.float64).exp().item()
    assert result["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert 3.0 < result["perplexity"] < 60.0  # plain prose, to a model of this size
