"""Every algorithm file, found by itself: its paper, its size, its collectives, which no branch may skip; and its bytes."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from fedmpi.settings.recipe import algorithm, known_algorithms
from tests.lockstep.ranks import STOPS, adapter, recipe, run

COLLECTIVES = {"broadcast", "gather"}


@pytest.fixture(params=known_algorithms())
def source(request: pytest.FixtureRequest) -> str:
    return Path(str(import_module(f"fedmpi.algorithms.{request.param}").__file__)).read_text()


def skippable(run_round: ast.FunctionDef) -> list[int]:
    """Lines of collectives that a branch, a loop or a try could skip, or that a lambda would delay."""
    inside = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension)
    found = []
    for outer in ast.walk(run_round):
        if isinstance(outer, inside):
            found += [node.lineno for node in ast.walk(outer) if is_collective(node)]
    return found


def is_collective(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in COLLECTIVES) == ("fed", True)
    )


def run_round_of(source: str) -> ast.FunctionDef:
    tree = ast.parse(source)
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_round")


def test_it_cites_its_paper_and_fits_the_eye(source: str) -> None:
    assert "arXiv" in (ast.get_docstring(ast.parse(source)) or "")
    assert len(source.splitlines()) <= 150
    function = run_round_of(source)
    assert (function.end_lineno or 0) - function.lineno < 30


def test_every_rank_meets_every_collective(source: str) -> None:
    function = run_round_of(source)
    assert any(is_collective(node) for node in ast.walk(function))
    assert skippable(function) == []


def test_the_lint_finds_a_collective_under_a_branch() -> None:
    wrong = "def run_round(fed, rnd, server, clients):\n    if server:\n        fed.broadcast(server.adapter)\n"
    assert skippable(run_round_of(wrong)) == [3]


def test_no_rank_is_compared(source: str) -> None:
    assert "rank" not in {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert ".rank" not in source


@pytest.mark.parametrize("name", known_algorithms())
def test_every_placement_and_a_stop_give_the_same_bytes(settings: list[str], deep_folder: Path, tmp_path: Path, name: str) -> None:
    """With few clients of many in a round: state that a client owns must find it again, wherever it lives."""
    offsite = hasattr(algorithm(name), "SCHEME")  # then there must be layers to drop
    short = [f"--model.path={deep_folder}", "--offsite.prealign_steps=2", "--offsite.align_steps=1"] if offsite else []
    wanted = recipe(*settings, *short, f"--algorithm={name}", "--train.optimizer_state=keep", STOPS)
    for size in (1, 2, 4):
        assert run(wanted, tmp_path / str(size), size) == [0] * size
    assert run(wanted, tmp_path / "parts", 2, stop_rank=1, stop_turn=8) == [75, 75]
    assert run(wanted, tmp_path / "parts", 4) == [0] * 4
    assert len({adapter(tmp_path / folder) for folder in ("1", "2", "4", "parts")}) == 1
