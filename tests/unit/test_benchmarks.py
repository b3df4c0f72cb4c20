"""Each benchmark runs, small, and prints one JSON line with the figures that it promises. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LAUNCHERS = ("SLURM_", "PMI", "OMPI_", "MPI_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")

CASES = {
    "exchange.py --clients 2 --rounds 2 --mib 0.5 --launcher torchrun": (
        *("system", "clients", "mib", "rounds", "sec_per_round_median", "startup_s", "server_peak_rss_mb", "ratio_to_floor"),
    ),
    "exchange.py --clients 2 --rounds 2 --mib 0.5 --launcher in_process": ("sec_per_round_median", "ratio_to_floor"),
    "data.py --rows 3000 --clients 10 --repeat 1": ("s", "cpu_s", "peak_rss_mb", "rows"),
    "evaluation.py --rows 2 --batch 2 --tokens 8 --repeat 1": (
        *("share_in_generate", "share_in_forward", "gsm8k_s", "one_at_a_time_s", "batched_s", "batching_ratio", "equal_answers"),
    ),
    "emulators.py --builders uniform,thin --steps 1 --rows 330 --max_length 96": ("model", "emulators"),
    "latency.py --ranks 3 --rounds 4 --launcher in_process": ("ms_per_round", "ms_per_round_with_checkpoint"),
    "simulate.py --clients 3 --per_round 2 --rounds 3 --steps 1 --layers 1 --hidden 32": (
        *("added_ms_per_turn", "added_ms_per_round", "bare_ms_per_turn"),
    ),
    "memory.py --server 1,2 --mib 0.5 --hosted 1,2 --rounds 1": (
        *("server_mb_per_client", "stateless_peak_mb_per_client", "with_state_peak_mb_per_client", "adapter_mb"),
    ),
}


@pytest.mark.parametrize("command", CASES)
def test_a_benchmark_prints_one_json_line(command: str) -> None:
    script, *arguments = command.split()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (line,) = ended.stdout.splitlines()
    figures = json.loads(line)
    for key in CASES[command]:
        assert figures[key] is not None, key
    for key in ("sec_per_round_median", "ratio_to_floor", "ms_per_round", "bare_ms_per_turn", "adapter_mb"):
        assert key not in figures or figures[key] > 0
