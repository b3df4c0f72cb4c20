"""A federation over torchrun in which no process unpickles anything, whatever library it calls, from the first import on."""

from pathlib import Path

from program import RECIPE, TORCHRUN, adapter_of, run

GUARDED = str(Path(__file__).with_name("guarded.py"))


def test_no_rank_unpickles_anything(tmp_path: Path, expected: str) -> None:
    run([*TORCHRUN, "--standalone", "--nproc_per_node=3", GUARDED, "--config", str(RECIPE), "--run_dir", "run"], tmp_path)
    assert adapter_of(tmp_path / "run") == expected
