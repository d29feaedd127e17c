"""The time of a decode step, taken apart: arithmetic on made-up traces; tracing itself needs CUDA."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

import cli
import hardware
from generator import Generator, Request
from kernels.decoder import Decoder, matrices
from scripts import bench, roofline
from scripts.roofline import LAYER_ROLES, Launch, breakdown, short_name, show
from tests.conftest import TINY, tiny_model

GATHER = "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(char*, char*, long*, int)"
LAYER = ["_vector_kernel", "_attention_kernel", *["_vector_kernel"] * 3]
STEP = [GATHER, *LAYER * 2, "packed_kernel", "_take_best_kernel"]  # of two layers
MATRICES = [SimpleNamespace(nbytes=n) for n in (300, 200, 700, 400, 310, 210, 710, 410, 5000)]
ROLES = [
    "other:vectorized_gather_kernel",
    "qkv",
    "attention",
    "o",
    "gate_up",
    "down",
    "head",
    "other:_take_best_kernel",
]


def in_a_row(names: list[str], *, us: float = 2.0) -> list[Launch]:
    return [Launch(name, us * i, us * (i + 1)) for i, name in enumerate(names)]


def overlapping(names: list[str]) -> list[Launch]:
    """Launches that begin before those ahead of them end, some inside of those, some after a gap."""
    launches, latest = [], 100.0
    for name in names:
        start = max(latest + random.uniform(-3.0, 2.0), launches[-1].start_us if launches else 0.0)
        launches.append(Launch(name, start, start + random.uniform(0.5, 8.0)))
        latest = max(latest, launches[-1].end_us)
    return launches


def taken_apart(launches: list[Launch], *, steps: int = 1, read_gbs: float = 1.0, rows: int = 1) -> dict:
    return breakdown(launches, steps=steps, matrices=MATRICES, attention_bytes=90, read_gbs=read_gbs, rows=rows)


def part(result: dict, name: str) -> dict:
    (row,) = (row for row in result["parts"] if row["part"] == name)
    return row


def test_own_times_and_gaps_add_up_to_the_step() -> None:
    launches = overlapping(STEP)
    result = taken_apart(launches)
    whole = max(launch.end_us for launch in launches) - launches[0].start_us
    assert result["total_us"] == pytest.approx(whole)
    assert sum(row["us"] for row in result["parts"]) + result["gaps_us"] == pytest.approx(whole)
    assert sum(row["gap_us"] for row in result["parts"]) == pytest.approx(result["gaps_us"])
    assert sum(row["share"] for row in result["parts"]) + result["gaps_us"] / whole == pytest.approx(1.0)


def test_own_time_counts_from_the_latest_end_before_it() -> None:
    launches = [Launch("a", 0, 10), Launch("inside", 2, 7), Launch("b", 8, 13), Launch("c", 15, 16)]
    result = taken_apart(random.sample(launches, k=4))  # in whatever order the profiler has them
    assert [(row["part"], row["us"], row["gap_us"]) for row in result["parts"]] == [
        ("a", 10, 0),
        ("inside", 0, 0),
        ("b", 3, 0),
        ("c", 1, 2),
    ]
    assert (result["gaps_us"], result["total_us"]) == (2, 16)


def test_times_are_medians_over_steps() -> None:
    launches, start = [], 0.0
    for gap, us in ((0.0, 3.0), (1.0, 2.0), (50.0, 2.0), (1.0, 40.0), (1.0, 2.0)):
        launches += [Launch("a", start + gap, start + gap + us), Launch("b", start + gap + us, start + gap + us + 1.0)]
        start += gap + us + 1.0
    result = taken_apart(launches, steps=5)
    assert [(row["us"], row["gap_us"], row["launches"]) for row in result["parts"]] == [(2, 1, 1), (1, 0, 1)]
    assert (result["gaps_us"], result["total_us"]) == (1, 4)


def test_launches_that_do_not_divide_into_steps_give_means() -> None:
    result = taken_apart([*in_a_row(STEP * 4), Launch("Memset (Device)", 200, 204)], steps=4)
    assert part(result, "qkv")["us"] == 4
    assert part(result, "other:Memset")["launches"] == 0.25
    assert result["total_us"] == 204 / 4


@pytest.mark.parametrize("kernel", ["_vector_kernel", "_product_kernel", "shared_kernel"])
def test_the_kth_matrix_kernel_reads_the_kth_matrix(kernel: str) -> None:
    step = [kernel if name == "_vector_kernel" else name for name in STEP]
    result = taken_apart(in_a_row(step * 3), steps=3, read_gbs=2.0, rows=4)
    assert [row["part"] for row in result["parts"]] == ROLES
    assert [row["launches"] for row in result["parts"]] == [1, 2, 2, 2, 2, 2, 1, 1]
    assert [row["bytes"] for row in result["parts"]] == [None, 610, 90, 410, 1410, 810, 5000, None]
    down = part(result, "down")
    assert down["us"] == 4
    assert down["gbs"] == pytest.approx(810 / 4e-6 / 1e9)
    assert down["fraction"] == pytest.approx(down["gbs"] / 2)
    assert part(result, "head")["kernels"] == ["packed_kernel"]
    assert part(result, ROLES[0])["gbs"] is None
    assert result["bytes"] == sum(m.nbytes for m in MATRICES) + 90
    assert result["total_us"] == 2 * len(STEP)
    assert result["gbs"] == pytest.approx(result["bytes"] / result["total_us"] / 1e3)
    assert result["tok_s"] == pytest.approx(4 / (result["total_us"] * 1e-6))


def test_other_counts_of_matrix_kernels_leave_names_without_bytes() -> None:
    step = [GATHER, *LAYER * 2, "nvjet_tst_64x8_64x16_4x1_v_bz_TNN"]  # the head by cuBLAS
    result = taken_apart(in_a_row(step * 2), steps=2)
    names = ["vectorized_gather_kernel", "_vector_kernel", "_attention_kernel", "nvjet_tst_64x8_64x16_4x1_v_bz_TNN"]
    assert [row["part"] for row in result["parts"]] == names
    assert part(result, "_vector_kernel")["launches"] == 8
    assert {row["bytes"] for row in result["parts"]} == {None}
    assert result["bytes"] == sum(m.nbytes for m in MATRICES) + 90  # the step reads them, whoever does it


def test_a_kernel_that_ends_inside_the_one_before_has_no_speed() -> None:
    launches = in_a_row(STEP)
    launches[2] = Launch("_attention_kernel", 2.5, 3.5)
    launches[7] = Launch("_attention_kernel", 12.5, 13.5)
    attention = part(taken_apart(launches), "attention")
    assert (attention["us"], attention["gbs"], attention["fraction"]) == (0, None, None)
    assert "attention" in show({"length": 9, **taken_apart(launches)})


@pytest.mark.parametrize(
    "signature, name",
    [
        (GATHER, "vectorized_gather_kernel"),
        ("_tile_kernel", "_tile_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("void gemvNSP_kernel<float, 1, Layout<(bool)1>>(Params<float>)", "gemvNSP_kernel"),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, Traits<4>>(Args<int>)", "kernel"),
        (
            "void at::native::elementwise_kernel<4, at::native::add<float>(int)::{lambda(int)#1}>(int)",
            "elementwise_kernel",
        ),
    ],
)
def test_signatures_are_cut_to_names(signature: str, name: str) -> None:
    assert short_name(signature) == name


def test_the_table_has_a_line_for_each_part_the_gaps_and_the_step() -> None:
    launches = in_a_row(STEP)
    launches[-1] = Launch("_take_best_kernel", 30.0, 31.0)  # 6 us after the head
    result = {"length": 77, **taken_apart(launches, read_gbs=0.5)}
    title, head, *rows = show(result).split("\n")
    assert "77 tokens" in title
    assert head.split()[:2] == ["part", "launches"]
    assert [row.split()[0] for row in rows] == [*ROLES, "gaps", "step"]
    assert rows[5].split() == ["down", "2", "4.0", "12.9%", "2.00", "0.0", "0.0", "0.2", "40.5%", "_vector_kernel"]
    assert rows[-3].split() == ["other:_take_best_kernel", "1", "1.0", "3.2%", "1.00", "6.0"]
    assert rows[-2].split() == ["gaps", "6.0", "19.4%"]
    assert rows[-1].split()[:4] == ["step", "13", "31.0", "100.0%"]
    assert rows[-1].endswith("tok/s")


def test_a_trace_repeats_the_step_at_one_context_and_counts_its_bytes(monkeypatch) -> None:
    generator = Generator(tiny_model(), max_seq_len=64, batch_size=2)
    generator.decoder = Decoder(generator.model, max_seq_len=64, batch_size=2)
    generator.fused = True
    generator.decoder.layers[1].heads = generator.decoder.layers[1].heads._replace(window=16)
    positions, decode = [], generator.decode

    def decode_and_look(length: int, sampling) -> None:
        positions.append((length, generator.input_pos.flatten().tolist()))
        decode(length, sampling)

    def record(run, device) -> list[Launch]:
        positions.clear()
        run()
        return in_a_row(STEP * len(positions))

    monkeypatch.setattr(generator, "decode", decode_and_look)
    monkeypatch.setattr(roofline, "record", record)
    monkeypatch.setattr(hardware, "read_bandwidth", lambda device, folder: 3e9)
    requests = [Request(prompt=[1, 2, 3]), Request(prompt=[4, 5, 6])]
    result = roofline.trace(generator, requests, 40, steps=5)
    assert positions == [(45, [at, at]) for at in range(40, 45)]
    assert (result["length"], result["steps"], result["rows"], result["read_gbs"]) == (40, 5, 2, 3.0)
    token = 2 * TINY.n_kv_heads * TINY.head_dim * 4  # of one layer, fp32
    assert part(result, "attention")["bytes"] == 2 * (40 + 16) * token
    for i, role in enumerate(LAYER_ROLES):
        assert part(result, role)["bytes"] == sum(m.nbytes for m in matrices(generator.decoder)[i:-1:4])
    assert part(result, "head")["bytes"] == generator.model.head.weight.nbytes
    assert part(result, "qkv")["launches"] == 2


def test_a_model_outside_the_kernels_is_refused() -> None:
    generator = Generator(tiny_model(), max_seq_len=64)
    with pytest.raises(ValueError, match=r"runs as Transformer; .*install triton"):
        roofline.trace(generator, [Request(prompt=[1])], 8)


@pytest.mark.parametrize(
    "options, remedy", [([], "the device is 'cpu'; use --device cuda"), (["--compile"], "the device is 'cpu'")]
)
def test_the_command_line_refuses_a_cpu_at_once(tiny_directory, capsys, options, remedy) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(bench.main, ["--checkpoint", str(tiny_directory), "--device", "cpu", "--roofline", *options])
    assert ended.value.code == 2
    assert remedy in capsys.readouterr().err


def test_an_uncompiled_step_is_refused() -> None:
    with pytest.raises(ValueError, match="add --compile"):
        roofline.check(torch.device("cuda"), compile=False)
    roofline.check(torch.device("cuda"), compile=True)


def test_bench_prints_the_breakdown(tiny_directory, cache_folder, capsys, monkeypatch) -> None:
    lengths = []

    def trace(generator: Generator, requests: list[Request], length: int) -> dict:
        lengths.append((len(requests), length))
        return {"length": length, **taken_apart(in_a_row(STEP), rows=len(requests))}

    monkeypatch.setenv("TACHYON_CACHE", str(cache_folder))
    monkeypatch.setattr(roofline, "check", lambda device, *, compile: None)
    monkeypatch.setattr(roofline, "trace", trace)
    options = ["--checkpoint", str(tiny_directory), "--device", "cpu", "--prompt-len", "6", "--new-tokens", "5"]
    options += ["--batch", "2", "--repeats", "1", "--roofline"]
    cli.run(bench.main, [*options, "--json"])
    result = json.loads(capsys.readouterr().out)["roofline"]
    assert [row["part"] for row in result["parts"]] == ROLES
    cli.run(bench.main, options)
    assert show(result) in capsys.readouterr().out
    assert lengths == [(2, 8), (2, 8)]
