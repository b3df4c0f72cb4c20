"""What robust aggregation bears: held-out loss with a quarter of the clients hostile, by rule and attack.

    python benchmarks/robust.py [--attacks none,sign_flip,...] [--rules mean,median,...] [--rounds 8] [--steps 8]

Eight clients fine-tune the packaged model on toy instructions, two of them hostile (examples/hostile.py). A rule written as
`median+` mixes nearest neighbours first. Prints one JSON line for each rule: the loss without an attack, and by attack how far the
loss is above that of the plain mean without an attack.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ATTACKS = "sign_flip,inner_product,alie,noise,label_poison"
RULES = "mean,trimmed_mean+,multi_krum,geometric_median+,median+,centred_clipping+"
TASK = ("--clients=8", "--data.splitter=iid", "--data.num_rows=800", "--data.max_length=64", "--eval_every=0", "--eval.rows=64")
TRAINED = ("--train.lr=0.01", "--train.batch_size=4", "--eval.task=none", "--weights=equal", "--scenario=fed")


def loss(asked: argparse.Namespace, rule: str, attack: str) -> float:
    """The held-out loss at the end of a run."""
    from fedmpi import run

    robust = [] if rule == "mean" else [f"--aggregation.robust={rule.rstrip('+')}"]
    robust += ["--aggregation.mixing=true"] if rule.endswith("+") else []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = [
            *TASK,
            *TRAINED,
            *robust,
            f"--rounds={asked.rounds}",
            f"--train.steps={asked.steps}",
            f"--run_dir={folder}/run",
        ]
        if run.main([*arguments, "--algorithm=examples.hostile", f"--hostile.attack={attack}"]):
            raise SystemExit(f"the run with {rule} against {attack} failed")
        return float(json.loads((Path(folder) / "run" / "summary.json").read_text())["final"]["eval_loss"])


def main() -> None:
    """One line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default=ATTACKS)
    parser.add_argument("--rules", default=RULES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    asked = parser.parse_args()
    clean = loss(asked, "mean", "none")
    for rule in asked.rules.split(","):
        own = clean if rule == "mean" else loss(asked, rule, "none")
        above = {attack: round(loss(asked, rule, attack) - clean, 4) for attack in asked.attacks.split(",")}
        print(
            json.dumps({"rule": rule, "clean_mean": round(clean, 4), "clean": round(own, 4), "above_clean_mean": above}), flush=True
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
