"""The comparison of codec chains: every run once and the search first, and verdicts that say what the losses say."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("quality")
    sys.path.remove(str(BENCHMARKS))


def test_every_run_comes_once_and_the_search_before_all(quality):
    keys = [cell.key for cell in quality.cells()]
    assert len(set(keys)) == len(keys)
    searched = ["/search/" in key for key in keys]
    assert searched == sorted(searched, reverse=True) and sum(searched) == len(quality.RATES)


@pytest.mark.parametrize(
    ("chain", "size", "excess", "told"),
    [
        ("int8", 4.06, (0.1, 0.5, 0.2), "met"),
        ("delta,int4,ef,zstd", 1.59, (0.1, 0.5, 0.4), "loss missed"),
        ("delta,int4,ef", 2.1, (-1.0, 0.1, 0.1), "size missed"),
        ("topk:0.2,int8,ef", 0.6, (1.0, 1.0, 1.1), "size missed and loss missed"),
        ("zstd", 15.0, (0.0, 0.0, 0.0), ""),
        ("int8", 4.06, (0.1, 0.2), ""),
    ],
)
def test_a_verdict_is_the_mean_of_all_seeds_against_the_target_of_its_kind(quality, chain, size, excess, told):
    found = quality.verdict(chain, size, dict(zip(quality.SEEDS, excess, strict=False)))
    assert found.partition(": ")[2] == told


def test_the_table_has_what_is_in_the_book_and_the_bits_of_the_ledger(quality, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MESSAGES", {"lora": 1 << 18})
    book, (name, rate, _) = quality.Book(tmp_path / "book.json"), quality.SETTINGS[0]
    for chain, loss, sent in (("raw", 2.0, 4000), ("int8", 2.01, 1000)):
        for seed in quality.SEEDS:
            book.put(quality.Cell(name, chain, "final", rate, seed), {"loss": loss, "up": sent, "down": sent})
    (line,) = [line for line in quality.tables(book).splitlines() if line.startswith("| `int8`")]
    assert "(+0.50, +0.50, +0.50) | 1,000, 1,000 | 8.00, 8.00 | 0.25 | 4.1 MiB, 0.3 %: loss missed |" in line
    assert quality.mib("raw", 1 << 18) == 1
