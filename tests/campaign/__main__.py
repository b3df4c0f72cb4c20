"""Run the campaign, or go on with it, and print what came of it. Exits 1 when anything was wrong.

    python -m tests.campaign --faults 2500 --seed 1 --out campaign [--launchers in_process=4,torchrun=8,mpirun=1,srun=1]

Every run is started again, as a batch system would, until it ends; each start has a time limit beyond which it hangs. A run that
lost contributions must end in the bytes of one without faults in which the same contributions are lost. Results stand in
OUT/results.jsonl, one line per run; a campaign that was stopped goes on with those that are not there. Much of a run is waiting:
`--at_once N` works on several. `--without NAME` switches a protection off (see unprotected.py): then something must be wrong.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.campaign import history, jobs, report
from tests.campaign.faults import DEADLINE_S, Fault
from tests.campaign.plan import NUM_ROUNDS, Planned, plan
from tests.campaign.unprotected import PROTECTIONS

FINISHED = 0
LIMIT_S, MAX_RESTARTS = 600.0, 12


@dataclasses.dataclass
class Campaign:
    """Where it leaves what, how it starts jobs, and what a run without a fault ends in."""

    out: Path
    jobs: jobs.Jobs
    without: Sequence[str] = ()
    undisturbed: str = ""

    def calm(self) -> None:
        """The bytes that a run without a fault ends in."""
        known = self.out / f"undisturbed-{self.jobs.rounds}-{self.jobs.clients}"
        if not known.exists():
            known.write_text(self.repeated("calm", {}))
        self.undisturbed = known.read_text()

    def repeated(self, name: str, lost: history.Lost) -> str:
        """What a run ends in, in one process and without a fault, in which these clients have no update in these rounds."""
        folder = self.folder(f"{name}-repeated", (), lost)
        code, _ = self.jobs.start("in_process", folder)
        if code != FINISHED:
            raise SystemExit(f"a run without faults exited {code}: {(folder / 'output.txt').read_text()[-2000:]}")
        digest = digest_of(folder)
        shutil.rmtree(folder)
        return digest

    def folder(self, name: str, faults: Sequence[Fault], lost: history.Lost, without: Sequence[str] = ()) -> Path:
        """A fresh folder for a run, with its plan."""
        folder = self.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        said = {"faults": [dataclasses.asdict(fault) for fault in faults], "lost": lost, "without": list(without)}
        (folder / "plan.json").write_text(json.dumps(said))
        return folder

    def carry_out(self, planned: Planned) -> dict[str, Any]:
        """One run to its end, and what is wrong with it."""
        folder = self.folder(f"run-{planned.number:05d}", planned.faults, {}, self.without)
        codes, seconds = [], []
        for _ in range(2 * len(planned.faults) + 4):  # on a busy machine a rank may seem silent though nothing is wrong
            code, took_s = self.jobs.start(planned.launcher, folder)
            codes.append(code)
            seconds.append(round(took_s, 2))
            _make_room_for_the_next(folder)
            if code in (FINISHED, None):
                break
        wrong, told = self.judged(folder, codes)
        made = sorted(path.name.removeprefix("made-") for path in (folder / "events").glob("made-*"))
        cells = [[fault.kind, fault.phase] for fault in planned.faults if fault.name in made]
        if not wrong:
            shutil.rmtree(folder)
        of_run = {"run": planned.number, "launcher": planned.launcher, "made": cells, "codes": codes, "seconds": seconds}
        return {**of_run, **told, "wrong": wrong}

    def carry_out_all(self, planned: Sequence[Planned], at_once: int, results: Path) -> None:
        """Each in a process of its own, so many at a time; what came of it is a line more in `results`."""
        running: set[int] = set()
        for one in planned:
            self.jobs.prepare(one.launcher)
            running.add(jobs.forked(partial(self._told, one, results)))
            while len(running) >= at_once:
                running.discard(os.wait()[0])
        while running:
            running.discard(os.wait()[0])

    def _told(self, planned: Planned, results: Path) -> int:
        line = json.dumps(self.carry_out(planned))
        with results.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        return 0

    def judged(self, folder: Path, codes: Sequence[int | None]) -> tuple[list[str], dict[str, Any]]:
        """What is wrong with a run, and what it cost."""
        if codes[-1] is None:
            return [f"hang: a start took more than {self.jobs.limit_s:g} s"], {}
        if codes[-1] != FINISHED:
            return [f"never finished: exit codes {codes}"], {}
        found = history.History.read(folder)
        lost, repeats = history.lost(found)
        expected = None if repeats else self.repeated(folder.name, lost) if lost else self.undisturbed
        return history.faults_of(found, digest_of(folder), expected), history.costs(found)


def _make_room_for_the_next(folder: Path) -> None:
    """What an operator does: remove the checkpoint that the program refused by name, and nothing else."""
    output = (folder / "output.txt").read_text(errors="replace")
    for path in (folder / "run" / "checkpoints").glob("round-*"):
        if f"{path.relative_to(folder)}: state.safetensors should have" in output:
            shutil.rmtree(path)
    (folder / "output.txt").rename(folder / f"output-{time.monotonic_ns()}.txt")


def digest_of(folder: Path) -> str:
    """Of the adapter that a run left."""
    return hashlib.sha256((folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def _shares(text: str) -> dict[str, int]:
    pairs = (part.partition("=") for part in text.split(","))
    found = {name: int(share or 1) for name, _, share in pairs}
    if unknown := found.keys() - set(jobs.LAUNCHERS):
        raise SystemExit(f"launchers {', '.join(sorted(unknown))}: there are {', '.join(jobs.LAUNCHERS)}")
    return found


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("campaign"))
    parser.add_argument("--launchers", default="in_process=4,torchrun=8,mpirun=1,srun=1", help="with their shares of the runs")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS, help="of each run")
    parser.add_argument("--deadline_s", type=float, default=DEADLINE_S, help="after which the runs take a peer for silent")
    parser.add_argument("--at_once", type=int, default=1, help="so many runs are worked on at a time")
    parser.add_argument("--limit_s", type=float, default=LIMIT_S, help="of one start")
    parser.add_argument("--without", help=f"a fault with and without its protection; of {', '.join(PROTECTIONS)}, or all")
    asked = parser.parse_args()
    shares = _shares(asked.launchers)
    out = asked.out.resolve()
    if not (out / "model").exists():
        jobs.in_a_fork(lambda: jobs.write_inputs(out))
    campaign = Campaign(out, jobs.Jobs(asked.limit_s, MAX_RESTARTS, asked.rounds, 2 if asked.without else 4, asked.deadline_s))
    jobs.warm_up(out, campaign.jobs.arguments)
    campaign.calm()
    try:
        if asked.without:
            names = list(PROTECTIONS) if asked.without == "all" else [asked.without]
            return min(_without(campaign, name) for name in names)
        results = out / "results.jsonl"
        there = {line["run"] for line in _read(results)}
        planned = [one for one in plan(asked.faults, asked.seed, shares, asked.rounds) if one.number not in there]
        campaign.carry_out_all(planned, asked.at_once, results)
    finally:
        campaign.jobs.close()
    return report.show(_read(results), tuple(shares))


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _without(campaign: Campaign, name: str) -> int:
    """The fault with its protection, which must do no harm, and without it. 1 where the checker sees that, as it should."""
    fault = PROTECTIONS[name][1]
    for_ever = ["return"] if fault.kind == "freeze" else []
    campaign.without = for_ever
    safe = campaign.carry_out(Planned(0, "in_process", (fault,)))
    campaign.without = [*for_ever, name]
    done = campaign.carry_out(Planned(1, "in_process", (fault,)))
    print(json.dumps({"without": name, "made": done["made"], "with_it": safe["wrong"], "wrong": done["wrong"]}), flush=True)
    return 1 if done["wrong"] and not safe["wrong"] and safe["made"] else 0


if __name__ == "__main__":
    sys.exit(main())
