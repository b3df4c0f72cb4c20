"""What came of a campaign: totals, times, and how often each fault was made in each phase under each launcher."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from tests.campaign.faults import CLIENT, PHASES, SERVER, WHY_NOT

Results = Sequence[Mapping[str, Any]]
REAL = ("torchrun", "mpirun", "srun")
SIGNALS = ("kill", "pause", "freeze", "term", "usr1", "reset", "truncate")


def totals(done: Results) -> dict[str, Any]:
    """Everything in numbers."""
    made = Counter((line["launcher"], kind) for line in done for kind, _ in line["made"])
    wrong = [text for line in done for text in line["wrong"]]
    hangs = sum(text.startswith("hang") for text in wrong)
    return {
        "faults": sum(made.values()),
        "by_launcher": {
            name: sum(n for (launcher, _), n in made.items() if launcher == name) for name in sorted({key[0] for key in made})
        },
        "signals_or_sockets_in_real_jobs": sum(n for (name, kind), n in made.items() if name in REAL and kind in SIGNALS),
        "runs": len(done),
        "starts": sum(len(line["codes"]) for line in done),
        "hangs": hangs,
        "wrong": len(wrong) - hangs,
        "rounds_done_again": sum(line.get("redone", 0) for line in done),
        **{key: _times([s for line in done for s in line.get(key, ())]) for key in ("gone_s", "silent_s", "resume_s")},
    }


def _times(seconds: Sequence[float]) -> dict[str, float] | None:
    return {"median": round(median(seconds), 2), "worst": round(max(seconds), 2), "num": len(seconds)} if seconds else None


def matrix(done: Results, launcher: str) -> list[str]:
    """Kinds by phases; `-` is impossible, and why is said below."""
    cells = Counter((kind, phase) for line in done if line["launcher"] == launcher for kind, phase in line["made"])
    phases = SERVER + CLIENT
    lines = [f"{launcher:12}" + "".join(f"{phase:>10}" for phase in phases)]
    for kind, possible in PHASES.items():
        lines.append(f"{kind:12}" + "".join(f"{cells[kind, p] if p in possible else '-':>10}" for p in phases))
    return lines


def empty(done: Results, launchers: Sequence[str]) -> list[tuple[str, str, str]]:
    """Possible cells in which nothing happened yet."""
    made = {(line["launcher"], kind, phase) for line in done for kind, phase in line["made"]}
    return [(n, kind, p) for n in launchers for kind, phases in PHASES.items() for p in phases if (n, kind, p) not in made]


def show(done: Results, launchers: Sequence[str]) -> int:
    """Print all of it; the exit code."""
    for launcher in launchers:
        print("\n".join(["", *matrix(done, launcher)]))
    print("\nimpossible (-):", "; ".join(f"{kind}: {why}" for kind, why in WHY_NOT.items()))
    if left := empty(done, launchers):
        print(f"possible and not made yet: {len(left)}")
    for key, value in totals(done).items():
        print(f"{key}: {value}")
    wrong = [line for line in done if line["wrong"]]
    for line in wrong:
        print(f"run {line['run']} ({line['launcher']}, {line['made']}): {'; '.join(line['wrong'])}")
    return 1 if wrong else 0
