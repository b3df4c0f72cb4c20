"""Each engine in a client of several ranks beside one rank with as large a batch: how far its adapter is, and what it costs.

    python benchmarks/engines.py [--engines ddp,fsdp,zero1,zero2,zero3] [--launcher torchrun|mpirun] [--rounds 3] [--steps 4]

One client of two ranks fine-tunes the packaged model on toy instructions, with SGD and without dropout, in fp32. Prints one JSON
line: by engine the largest difference of any weight of the adapter and of the held-out loss from one rank's, milliseconds of a step
and the bytes up a round, which are those of a whole adapter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENGINES = {
    "ddp": ("--train.engine=ddp",),
    "fsdp": ("--train.engine=fsdp",),
    **{f"zero{stage}": ("--train.engine=deepspeed", f"--train.zero_stage={stage}") for stage in (1, 2, 3)},
}
TASK = ("--clients=1", "--data.splitter=iid", "--data.num_rows=200", "--data.max_length=64", "--eval.rows=32", "--eval.task=none")
TRAINED = ("--train.optimizer=sgd", "--train.lr=0.3", "--scenario=fed", "--eval_every=0")


def run(asked: argparse.Namespace, folder: Path, ranks: int, *more: str) -> dict[str, Any]:
    """What a run of so many ranks left: its final loss, its seconds and bytes, its adapter."""
    from safetensors.torch import load_file

    size = (f"--rounds={asked.rounds}", f"--train.steps={asked.steps}", f"--run_dir={folder}")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m", "fedmpi.run")
    if ranks == 1:
        command = [sys.executable, "-m", "fedmpi.run"]
    else:
        command = [sys.executable, *torchrun] if asked.launcher == "torchrun" else ["bash", f"{ROOT}/launch/mpirun.sh", str(ranks)]
    done = subprocess.run([*command, *TASK, *TRAINED, *size, *more], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    if done.returncode:
        sys.exit(done.stdout[-1500:] + done.stderr[-1500:])
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    up = next(line["up_bytes"] for line in lines if "event" not in line)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {"loss": summary["final"]["eval_loss"], "step_s": summary["step_s"], "up_bytes": up, "adapter": adapter}


def main() -> None:
    """One rank first, then every engine on two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--launcher", default="torchrun", choices=("torchrun", "mpirun"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        one = run(asked, Path(folder) / "one", 1, "--train.batch_size=8")
        for name in asked.engines.split(","):
            many = run(asked, Path(folder) / name, 3, "--ranks_per_client=2", "--train.batch_size=4", *ENGINES[name])
            found[name] = {
                "weights_differ": max(float((many["adapter"][key] - one["adapter"][key]).abs().max()) for key in one["adapter"]),
                "loss_differs": abs(many["loss"] - one["loss"]),
                "step_ms": round(1e3 * many["step_s"], 1),
                "up_bytes": many["up_bytes"],
            }
    about = {"launcher": asked.launcher, "one_rank_step_ms": round(1e3 * one["step_s"], 1), "one_rank_up_bytes": one["up_bytes"]}
    print(json.dumps({"benchmark": "engines", **about, "engines": found}))


if __name__ == "__main__":
    main()
