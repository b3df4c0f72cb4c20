"""The papers' figures in benchmarks/published agree with themselves: what a paper prints twice is the same number twice."""

import json
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published"


def figures(name: str) -> dict:
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def test_gsm8k_shares_are_the_counts_over_1319():
    for methods in figures("fedbiot")["table_2"]["rows"].values():
        for percent, right in (pair for models in methods.values() for pair in models.values() if pair):
            assert percent == pytest.approx(100 * right / 1319, abs=0.01)  # one of them is cut, not rounded


def test_relative_scores_are_ratios():
    for theirs, shepherd, ratio in figures("fedit")["table_3"]["rows"].values():
        assert ratio == pytest.approx(shepherd / theirs, abs=0.00051)


def test_every_table_of_fs_llm_is_whole():
    paper = figures("fs_llm")
    sets = {"fed-code-alpaca", "fed-dolly", "fed-gsm8k-3"}
    for name, scenarios in {"table_2": 9, "table_3": 3, "table_5": 4}.items():
        rows = [row for method in paper[name]["rows"].values() for row in method.values()]
        assert len(rows) == scenarios and all(set(row) == sets for row in rows)
        assert all(0 <= spread <= 10 and 0 <= mean < 50 for row in rows for mean, spread in row.values())


def test_fewer_layers_trained_cost_less():
    for rows in figures("fedbiot")["table_5"]["rows"].values():
        two, four, ot = (rows[name] for name in ("fedbiot-2", "fedbiot-4", "fedot"))
        assert two["trainable_m"] * 2 == four["trainable_m"] == ot["trainable_m"]
        assert two["gflop_per_token"] < four["gflop_per_token"] < ot["gflop_per_token"]
