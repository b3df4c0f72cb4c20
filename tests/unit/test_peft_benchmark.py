"""The comparison of PEFT methods: a search, the seeds, times in turns; and what is known is not made again."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from evaluation_data import DATA, shared

ROOT = Path(__file__).parents[2]


def test_methods_are_compared_and_gone_on_with(tmp_path, monkeypatch, capsys):
    shared("dolly15k")
    shared("models/stories260K")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods = importlib.import_module("methods")
    monkeypatch.setattr(methods, "METHODS", {"prefix, 20 tokens": methods.METHODS["prefix, 20 tokens"]})
    monkeypatch.setattr(methods, "RATES", (0.1,))
    monkeypatch.setattr(methods, "HIGHER", {})
    monkeypatch.setattr(methods, "SEEDS", (1, 2))
    results = tmp_path / "results.json"
    small = ["--rows=60", "--test=9", "--rounds=1", "--steps=1", "--length=48", "--turns=1"]
    monkeypatch.setattr(sys, "argv", ["", f"--shared={DATA}", f"--work={tmp_path}", f"--results={results}", *small])
    methods.main()
    (found,) = json.loads(results.read_text())["methods"].values()
    assert found["up_bytes"] == found["down_bytes"] == 4 * 20 * 5 * 2 * 32  # tokens, layers, keys and values, width
    assert len(found["losses"]) == 2 and found["step_s"] > 0 and "| prefix, 20 tokens | 0.1 | " in capsys.readouterr().out

    monkeypatch.setattr(methods, "HIGHER", {"prefix, 20 tokens": (1e-6,)})  # worse, so that the best stays
    monkeypatch.setattr(methods, "SEEDS", ())
    methods.main()
    (again,) = json.loads(results.read_text())["methods"].values()
    assert again["searched"].keys() == {"0.1", "1e-06"} and again["losses"] == found["losses"]
    assert again["searched"]["0.1"] == pytest.approx(found["searched"]["0.1"], abs=0)
