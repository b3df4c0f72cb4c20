"""Nothing on the wire or on disk is ever unpickled: not by our code, and (tests/launch) not by anything that it calls."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "fedmpi").rglob("*.py"))
PICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "copyreg")
# What unpickles under another name: torch's files and object collectives, numpy's object arrays, pandas.
CALLS = ("read_pickle", "send_object_list", "recv_object_list", "broadcast_object_list", "gather_object", "scatter_object_list")
CALLS += ("all_gather_object", "allow_pickle")
# mpi4py's methods in lower case pickle; those with a capital send buffers.
MPI_PICKLES = ("send", "recv", "isend", "irecv", "bcast", "gather", "scatter", "allgather", "reduce", "allreduce", "sendrecv")


def picklers(tree: ast.AST, is_mpi: bool) -> list[str]:
    """What in a module could unpickle, by name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [name for name in names if name.split(".")[0] in PICKLERS]
        if isinstance(node, ast.keyword) and node.arg in CALLS:
            found.append(str(node.arg))
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            found += [node.attr] if node.attr in CALLS else []
            found += [f"{owner}.load"] if node.attr == "load" and owner == "torch" else []
            found += [f"{owner}.{node.attr}"] if is_mpi and node.attr in MPI_PICKLES and "comm" in owner.lower() else []
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_unpickle(path: Path) -> None:
    assert picklers(ast.parse(path.read_text()), path.name == "mpi.py") == []


def test_the_lint_sees_what_it_looks_for() -> None:
    bad = "import pickle\nfrom dill import loads\nimport torch\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nself._comm.recv(0)"
    assert len(picklers(ast.parse(bad), is_mpi=True)) == 5


def test_the_guard_of_the_launch_tests_guards(tmp_path: Path) -> None:
    """An object that needs a name to be looked up ends a guarded process."""
    (tmp_path / "some.pickle").write_bytes(pickle.dumps(ROOT))
    guarded = ROOT / "tests" / "launch" / "guarded.py"
    code = f"import sys, runpy; g = runpy.run_path({str(guarded)!r}); sys.addaudithook(g['guard']); import pickle; "
    code += f"pickle.load(open({str(tmp_path / 'some.pickle')!r}, 'rb'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "something was unpickled" in done.stderr
