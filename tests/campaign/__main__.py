"""Run the campaign, or go on with it, and print what came of it. Exits 1 when anything was wrong.

    python -m tests.campaign --faults 2500 --seed 1 --out campaign [--launchers in_process,torchrun,mpirun]

Every run is started again, as a batch system would, until it ends; each start has a time limit beyond which it hangs. Results
stand in OUT/results.jsonl, one line per run; a campaign that was stopped goes on behind the last of them.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.campaign import history
from tests.campaign.faults import DEADLINE_S, PHASES, possible
from tests.campaign.plan import NUM_RANKS, NUM_ROUNDS, Planned, plan

ROOT = Path(__file__).parents[2]
LIMIT_S = 240.0  # of one start; on an idle machine it takes a tenth
FINISHED, STOPPED = 0, 75
ARGUMENTS = (
    *("--rounds", str(NUM_ROUNDS), "--clients", "4", "--data.num_rows", "60", "--data.max_length", "64", "--train.steps", "3"),
    *("--train.batch_size", "2", "--eval_every", "0", "--eval.task", "none", "--checkpoint_every", "1", "--keep", "3"),
    *("--train.optimizer_state", "keep", "--timeout_s", str(DEADLINE_S), "--run_dir", "run"),
)
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
LAUNCHERS = ("SLURM_", "PMI", "OMPI_", "MPI_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def command(launcher: str, folder: Path) -> list[str]:
    """How a user would start it, with the probe in the program's place."""
    ours = ["tests.campaign.rank", str(folder), str(folder / "faults.json")]
    if launcher == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
        return [*start, "--max-restarts=3", "-m", *ours, "1", *ARGUMENTS]
    if launcher == "mpirun":
        beside = Path(sys.executable).with_name("mpirun")
        mpirun = str(beside) if beside.exists() else "mpirun"
        return [mpirun, "-n", str(NUM_RANKS), sys.executable, "-m", *ours, "1", *ARGUMENTS]
    return [sys.executable, "-m", *ours, str(NUM_RANKS), *ARGUMENTS]


def start(launcher: str, folder: Path) -> tuple[int | None, float]:
    """One start of the job: its exit code, None for a hang, and how long it took. Nothing of it is left behind."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (MPI_ENVIRONMENT if launcher == "mpirun" else {})
    began = time.monotonic()
    with (folder / "output.txt").open("a") as output:
        job = subprocess.Popen(
            command(launcher, folder), cwd=folder, env=kept | more, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = job.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        _end_all_of(job.pid, folder)
    return code, time.monotonic() - began


def _end_all_of(session: int, folder: Path) -> None:
    """Kill what is left of a job: its process group, and whoever works in its folder."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        with_it = str(folder) in " ".join(process.info["cmdline"] or [])
        if with_it and process.pid != os.getpid():
            process.send_signal(signal.SIGKILL)


def carry_out(planned: Planned, out: Path, undisturbed: str) -> dict[str, Any]:
    """One run to its end, and what is wrong with it."""
    folder = out / f"run-{planned.number:05d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "faults.json").write_text(json.dumps([dataclasses.asdict(fault) for fault in planned.faults]))
    codes, wrong, took_s = [], [], []
    for _ in range(len(planned.faults) + 3):
        code, seconds = start(planned.launcher, folder)
        codes.append(code)
        took_s.append(round(seconds, 2))
        _make_room_for_the_next(folder, wrong)
        if code in (FINISHED, None):
            break
    if codes[-1] is None:
        wrong.append(f"hang: a start took more than {LIMIT_S:g} s")
    elif codes[-1] != FINISHED:
        wrong.append(f"never finished: exit codes {codes}")
    else:
        found = history.History.read(folder, digest_of(folder))
        wrong += history.faults_of(found, undisturbed)
    made = sorted(path.name.removeprefix("made-") for path in (folder / "events").glob("made-*"))
    cells = [[fault.kind, fault.phase] for fault in planned.faults if fault.name in made]
    if not wrong:
        shutil.rmtree(folder)
    return {"run": planned.number, "launcher": planned.launcher, "made": cells, "codes": codes, "seconds": took_s, "wrong": wrong}


def _make_room_for_the_next(folder: Path, wrong: list[str]) -> None:
    """What an operator does: remove the checkpoint that the program refused by name, and nothing else."""
    output = (folder / "output.txt").read_text(errors="replace")
    for path in (folder / "run" / "checkpoints").glob("round-*"):
        if f"{path.relative_to(folder)}: state.safetensors should have" in output:
            shutil.rmtree(path)
    (folder / "output.txt").rename(folder / f"output-{time.monotonic_ns()}.txt")


def digest_of(folder: Path) -> str:
    """Of the adapter that a run left."""
    return hashlib.sha256((folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def calm(out: Path) -> str:
    """The bytes that a run without a fault ends in."""
    known = out / "undisturbed"
    if not known.exists():
        folder = out / "calm"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "faults.json").write_text("[]")
        code, _ = start("in_process", folder)
        if code != FINISHED:
            raise SystemExit(f"the undisturbed run exited {code}: {(folder / 'output.txt').read_text()[-2000:]}")
        known.write_text(digest_of(folder))
    return known.read_text()


def report(done: Sequence[Mapping[str, Any]], launchers: Sequence[str]) -> int:
    """Totals, the matrix of what was made where, and the exit code."""
    cells = Counter((line["launcher"], kind, phase) for line in done for kind, phase in line["made"])
    for launcher in launchers:
        print(f"\n{launcher:12}" + "".join(f"{phase:>10}" for phase in PHASES["kill"]))
        for kind, phases in PHASES.items():
            if possible(kind, launcher):
                shown = (str(cells[launcher, kind, phase]) if phase in phases else "-" for phase in PHASES["kill"])
                print(f"{kind:12}" + "".join(f"{text:>10}" for text in shown))
    wrong = [line for line in done if line["wrong"]]
    hangs = sum("hang" in text for line in wrong for text in line["wrong"])
    print(f"\nfaults {sum(cells.values())}, runs {len(done)}, hangs {hangs}, wrong {len(wrong)}")
    ended = [s for line in done for code, s in zip(line["codes"], line["seconds"], strict=True) if code not in (FINISHED, None)]
    if ended:
        print(f"seconds of a start that a fault ended: median {median(ended):.1f}, most {max(ended):.1f}")
    for line in wrong:
        print(f"run {line['run']} ({line['launcher']}, {line['made']}): {'; '.join(line['wrong'])}")
    return 1 if wrong else 0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("campaign"))
    parser.add_argument("--launchers", default="in_process,torchrun,mpirun")
    asked = parser.parse_args()
    out, launchers = asked.out.resolve(), asked.launchers.split(",")
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    undisturbed = calm(out)
    for planned in plan(asked.faults, asked.seed, launchers)[len(done) :]:
        done.append(carry_out(planned, out, undisturbed))
        with results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(json.dumps(done[-1]), flush=True)
    return report(done, launchers)


if __name__ == "__main__":
    sys.exit(main())
