"""What robust aggregation bears: held-out loss with a quarter of the clients hostile, for every rule and every attack.

    python benchmarks/robust.py [--rules mean,median,median+,...] [--attacks none,sign_flip,...] [--rounds 5] [--steps 4]

Eight clients fine-tune the packaged model on toy instructions, two of them hostile (examples/hostile.py). A rule written as
`median+` mixes nearest neighbours first. Every run's loss is kept in RESULTS as soon as it is there, and a run of the same settings
that is there is not made again. Prints one JSON line: the loss of the plain mean without an attack, and by rule and attack how far
a loss is above it.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "robust.json"
ATTACKS = ("none", "sign_flip", "inner_product", "alie", "noise", "label_poison")
ROBUST = ("median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "clipping", "centred_clipping")
RULES = ("mean", *ROBUST, *(f"{rule}+" for rule in ROBUST))
TASK = ("--clients=8", "--data.splitter=iid", "--data.num_rows=800", "--data.max_length=64", "--eval_every=0", "--eval.rows=64")
TRAINED = ("--train.lr=0.01", "--train.batch_size=4", "--eval.task=none", "--weights=equal", "--scenario=fed")


def loss(asked: argparse.Namespace, rule: str, attack: str) -> float:
    """The held-out loss at the end of a run."""
    from fedmpi import run

    robust = [] if rule == "mean" else [f"--aggregation.robust={rule.rstrip('+')}"]
    robust += ["--aggregation.mixing=true"] if rule.endswith("+") else []
    long = (f"--rounds={asked.rounds}", f"--train.steps={asked.steps}", f"--checkpoint_every={asked.rounds}")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = [*TASK, *TRAINED, *robust, *long, f"--run_dir={folder}/run"]
        if run.main([*arguments, "--algorithm=examples.hostile", f"--hostile.attack={attack}"]):
            raise SystemExit(f"the run with {rule} against {attack} failed")
        return float(json.loads((Path(folder) / "run" / "summary.json").read_text())["final"]["eval_loss"])


def known(asked: argparse.Namespace) -> dict[str, Any]:
    """What earlier runs of these settings left."""
    settings = {"rounds": asked.rounds, "steps": asked.steps, "arguments": [*TASK, *TRAINED]}
    found = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    return found if found.get("settings") == settings else {"settings": settings, "losses": {}}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--attacks", default=",".join(ATTACKS))
    made.add_argument("--rules", default=",".join(RULES))
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--results", type=Path, default=RESULTS)
    return made


def main() -> None:
    """Every rule against every attack, the clean mean first."""
    asked = parser().parse_args()
    rules, attacks = asked.rules.split(","), asked.attacks.split(",")
    found = known(asked)
    for rule, attack in [("mean", "none"), *((rule, attack) for rule in rules for attack in attacks)]:
        if attack not in found["losses"].setdefault(rule, {}):
            found["losses"][rule][attack] = loss(asked, rule, attack)
            asked.results.parent.mkdir(parents=True, exist_ok=True)
            asked.results.write_text(json.dumps(found, indent=1) + "\n")
    clean = found["losses"]["mean"]["none"]
    above = {rule: {attack: round(found["losses"][rule][attack] - clean, 3) for attack in attacks} for rule in rules}
    print(json.dumps({"benchmark": "robust", "clean_mean": round(clean, 4), "above_clean_mean": above}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
