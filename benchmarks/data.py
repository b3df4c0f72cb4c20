"""Loading and splitting a corpus of alpaca's size over many clients, without tokenising: seconds and memory.

    python benchmarks/data.py [--path FILE] [--rows 52002] [--clients 100] [--splitter iid] [--repeat 3]

The file's rows are repeated until there are so many, into a JSON array as alpaca is published, which is then loaded and dealt
`--repeat` times in a process of its own each, as a rank meets it. Without a file, rows are made of alpaca's mean length. Prints
one JSON line: seconds of load and split after Python's imports (s; cpu_s of the processor), with them, and the peak memory.
"""

import argparse
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALPACA = {"instruction": 60, "input": 22, "output": 270}  # characters, on the mean


def write(asked: argparse.Namespace, path: Path) -> None:
    """The corpus as one JSON array."""
    if asked.path:
        content = Path(asked.path).read_bytes()
        rows = json.loads(gzip.decompress(content) if asked.path.endswith(".gz") else content)
    else:
        rows = [{name: f"{i} {'word ' * (size // 5)}" for name, size in ALPACA.items()} for i in range(2000)]
    path.write_text(json.dumps(list(itertools.islice(itertools.cycle(rows), asked.rows))), encoding="utf-8")


def load(path: str, clients: int, splitter: str) -> None:
    """One process: what a rank does before it tokenises."""
    started = time.perf_counter()
    from fedmpi.data import Config
    from fedmpi.data.clients import federate

    imported, busy = time.perf_counter(), time.process_time()
    federated = federate(Config(name="alpaca", path=path, splitter=splitter), clients, 0)  # type: ignore[arg-type]
    done, cpu_s = time.perf_counter(), time.process_time() - busy
    rows = sum(len(client.train) + len(client.heldout) for client in federated.clients)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    figures = {"s": done - imported, "cpu_s": cpu_s, "with_imports_s": done - started, "rows": rows}
    print(json.dumps({**figures, "peak_rss_mb": int(peak.split()[1]) / 1024}))


def main() -> None:
    """Make the file, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="JSON array of rows, plain or .gz")
    parser.add_argument("--rows", type=int, default=52_002)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--splitter", default="iid")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        load(asked.load, asked.clients, asked.splitter)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alpaca_data.json"
        write(asked, path)
        arguments = ["--load", str(path), "--clients", str(asked.clients), "--splitter", asked.splitter]
        command = [sys.executable, __file__, *arguments]
        runs = [json.loads(subprocess.check_output(command, env=dict(os.environ))) for _ in range(asked.repeat)]
        size_mb = path.stat().st_size / 1e6
    figures = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
    told = {"benchmark": "data", "clients": asked.clients, "splitter": asked.splitter, "file_mb": round(size_mb, 1), **figures}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
