"""Data that stay where they are, with real processes: an audit hook of each rank's interpreter tells which files it has opened."""

import json
import sys
from pathlib import Path

import pytest
from program import TORCHRUN, adapter_of, run

pytestmark = pytest.mark.timeout(600)

WATCHED = """
import os, sys
rank = os.environ.get("RANK", "alone")
log = open(f"opened-{rank}.txt", "w")
def watch(event, values):
    if event == "open" and isinstance(values[0], str) and "/site/" in values[0]:
        print(os.path.basename(values[0]), file=log, flush=True)
sys.addaudithook(watch)
from fedmpi.run import main
sys.exit(main())
"""


def test_each_process_opens_its_own_clients_files_alone(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for client in range(3):
        rows = [{"instruction": f"client {client} says {i}", "response": str(i)} for i in range(12 + client)]
        (site / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "watched.py").write_text(WATCHED)
    own = ["--data.name", "json", "--data.splitter", "given", "--data.path", f"{site}/{{client}}.jsonl", "--data.max_length", "64"]
    given = ["watched.py", "--clients", "3", "--rounds", "2", "--train.steps", "1", *own]
    run([sys.executable, *given, "--run_dir", "one"], tmp_path)
    run([*TORCHRUN, "--standalone", "--nproc_per_node", "3", *given, "--run_dir", "three"], tmp_path)
    opened = {path.stem: set(path.read_text().split()) for path in tmp_path.glob("opened-*.txt")}
    assert opened == {
        **{"opened-alone": {"0.jsonl", "1.jsonl", "2.jsonl"}, "opened-0": set()},
        **{"opened-1": {"0.jsonl", "2.jsonl"}, "opened-2": {"1.jsonl"}},
    }
    assert adapter_of(tmp_path / "one") == adapter_of(tmp_path / "three")
    records = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "three")]
    assert records[0]["data"] == records[1]["data"] and records[0]["final"] == records[1]["final"]
