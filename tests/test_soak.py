"""scripts/soak: it finds what a server still holds, and its users are those it says."""

import itertools
import json
import os
from pathlib import Path

import pytest

import cli
from sampling import SamplingParams
from scripts import soak
from serving.request import Request
from tests.fake_engine import serve
from tokenizer import load_tokenizer


def test_every_kind_of_user_comes_and_a_server_that_lets_go_passes(tiny_directory: Path, capsys, monkeypatch) -> None:
    tokenizer = load_tokenizer(tiny_directory)
    monkeypatch.setattr("tests.fake_engine.WAITING", 0)
    with serve(tokenizer, lambda request, index: tokenizer.encode("the world ") * 9) as live:
        options = [
            "--url",
            live.url,
            "--pid",
            str(os.getpid()),
            "--minutes",
            "0.03",
            "--users",
            "6",
            "--patience-s",
            "0.2",
        ]
        cli.run(soak.main, [*options, "--json"])
        result = json.loads(capsys.readouterr().out)
        kinds = {kind.split()[0] for kind in result["answers"]}
        assert kinds == {"stays", "leaves", "dawdles", "errs"}
        assert {k for k in result["answers"] if k.startswith(("stays", "dawdles"))} == {"stays 200", "dawdles 200"}
        assert result["requests"] == sum(result["answers"].values()) and result["memory_mb"]

        kept = Request(id="kept", prompt=[1], params=SamplingParams(), max_new_tokens=10**9)
        live.engine.live["kept", 0] = [kept, itertools.repeat(5), None, 0]
        monkeypatch.setattr(soak, "SETTLE_S", 0.2)
        with pytest.raises(SystemExit):
            cli.run(soak.main, options)
        assert "still holds something" in capsys.readouterr().err


def test_options_that_cannot_be(capsys) -> None:
    for options in (["--minutes", "0"], ["--users", "0"], ["--url", "http://127.0.0.1:9", "--minutes", "0.001"]):
        with pytest.raises(SystemExit):
            cli.run(soak.main, options)
        assert capsys.readouterr().err.count("\n") == 1
