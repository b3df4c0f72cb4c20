"""Comparisons of methods: every cell once, the search before what it decides, the same runs again after a kill, and tables that say
what the results say."""

import importlib
import json
import signal
import sys
from pathlib import Path

import pytest

from fedmpi.errors import ConfigError
from fedmpi.settings import recipe
from fedmpi.stop import Stop

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def offsite():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("offsite")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def cells(offsite):
    return importlib.import_module("cells")


def performed(offsite, cells, path, stop=None):
    """Every cell in its order, each with a loss that is its rate, so that the least rate is found best."""
    book, done = cells.Book(path), []
    for cell, _ in offsite.cells(book, list(cells.CORPORA)):
        if cell.key in book.cells:
            continue
        if len(done) == stop:
            break
        book.put(cell, {"loss": cell.rate, "loss_emu": 2.0, "accuracy": 0.5, "cpu_s": 60.0})
        done.append(cell)
    return book, done


def test_a_killed_comparison_goes_on_and_makes_no_cell_twice(offsite, cells, tmp_path):
    _, first = performed(offsite, cells, tmp_path / "book.json", stop=20)
    book, rest = performed(offsite, cells, tmp_path / "book.json")
    keys = [cell.key for cell in [*first, *rest]]
    assert len(first) == 20 and len(set(keys)) == len(keys) == len(book.cells)
    whole, tuned = len(offsite.WHOLE), len(offsite.TUNED)
    searches = (whole + tuned) * len(offsite.RATES)
    finals = (whole + 2 * tuned + len(offsite.ABLATED)) * len(cells.SEEDS)
    assert len(keys) == len(cells.CORPORA) * (searches + finals)
    assert all(cell.rate == min(offsite.RATES) for cell in [*first, *rest] if cell.part == "final")
    assert "192 of 192 final runs" in offsite.tables(book) and "partial" not in offsite.tables(book)


def test_a_signal_between_two_cells_is_the_programs_own(cells):
    before = signal.getsignal(signal.SIGTERM)
    with cells.own_signals():
        Stop().install()
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_seeds_that_are_missing_are_told(offsite, cells, tmp_path):
    book, _ = performed(offsite, cells, tmp_path / "book.json", stop=30)
    text = offsite.tables(book)
    assert "the tables are partial" in text and "2.000 (1)" in text and "50.0 (1)" in text


def test_every_method_is_a_command_that_is_understood(offsite, cells, tmp_path):
    seen = set()
    for name, method in {**offsite.WHOLE, **offsite.TUNED, **offsite.HALVED, **offsite.ABLATED}.items():
        cell = cells.Cell("rosetta", name, "search", 0.01, 0)
        given = cells.arguments(cell, method, Path("shared"), tmp_path)
        wanted, _ = recipe.read(given, "test", "")
        scheme = getattr(recipe.algorithm(wanted.algorithm), "SCHEME", None)
        outside = scheme.resolve(wanted.offsite) if scheme else None
        seen.add(f"{wanted.algorithm} {wanted.scenario} {outside}")
        assert (wanted.rounds, wanted.train.steps, wanted.clients, wanted.train.lr) == (5, 4, 9, 0.01)
        assert wanted.train.batch_size == (18 if wanted.scenario == "global" else 2)
    assert len(seen) == 16  # no two are the same experiment


def test_validation_rows_of_the_built_in_tasks_are_nobody_elses(cells):
    parts = [{(row.instruction, row.input) for row in rows} for rows in cells.toy_rows()]
    assert [len(part) for part in parts] == [cells.ROWS, cells.HELD_OUT, cells.HELD_OUT]
    assert len(set.union(*parts)) == cells.ROWS + 2 * cells.HELD_OUT


def test_differences_are_between_runs_of_one_seed(cells):
    assert cells.paired({1: 3.0, 2: 5.0, 3: 4.0}, {1: 2.0, 2: 4.5, 3: 3.0}) == "0.833 ± 0.289"
    assert cells.paired({1: 3.0}, {2: 2.0}) == "" and cells.shown([1.0, 2.0], 1) == "1.5 ± 0.7 (2)"


@pytest.mark.parametrize("name", ["offsite", "builders"])
def test_the_readme_says_what_the_results_say(name, offsite, cells, tmp_path):
    program = importlib.import_module(name)
    text = program.tables(cells.Book(program.RESULTS))
    readme = tmp_path / "README.md"
    readme.write_text((BENCHMARKS / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    cells.publish(name, text, readme)
    assert readme.read_text(encoding="utf-8") == (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert json.loads(program.RESULTS.read_text())["cells"]


def test_a_readme_without_the_marks_is_one_clear_line(cells, tmp_path):
    (tmp_path / "README.md").write_text("# Nothing\n")
    with pytest.raises(ConfigError, match="no lines <!-- offsite: made by the program -->"):
        cells.publish("offsite", "a table", tmp_path / "README.md")
