"""Score a run, or a model folder, on a task.

    python -m fedmpi.evaluate RUN_DIR                       (the task of its data set, or perplexity)
    python -m fedmpi.evaluate RUN_DIR --task gsm8k --data test.jsonl --shots cot_8shot.txt
    python -m fedmpi.evaluate MODEL --task helm-mini --data HELM_FOLDER --out results
    torchrun --nproc_per_node 4 -m fedmpi.evaluate RUN_DIR --task gsm8k       (the same numbers, sooner)

A run folder brings its own configuration: base model, adapter, data, template. The result is RUN_DIR/evaluations/TASK.json, with
every output. An evaluation that was interrupted goes on where it stopped. Exit codes: 0 done, 1 failed, 2 not possible.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedmpi import models
from fedmpi.command import FINISHED, guarded
from fedmpi.errors import ConfigError
from fedmpi.target import Target, default_task, open_target
from fedmpi.world import from_environment

if TYPE_CHECKING:
    from fedmpi.transports.base import Transport

TASKS = (
    "perplexity, exact_match, gsm8k, humaneval, humaneval-x:LANGUAGE, helm, helm-mini, helm-qa (and helm:SUBTASK), answers, judge, "
    "lm_eval:NAME"
)
TIMEOUT_S = 60.0  # without a heartbeat of another rank
CHUNK = 4  # batches between two times that records are written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    given = _parser().parse_args(arguments)
    return guarded(lambda: run(given), "evaluate")


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fedmpi.evaluate", description=__doc__, formatter_class=about)
    add = parser.add_argument
    add("target", help="the folder of a run, a model folder, a hub id, or builtin:tiny")
    add("--task", default="auto", help=f"{TASKS}; auto: what the run's data set is scored with (gsm8k, helm, ...), else perplexity")
    add("--data", help="the task's file or folder; lm_eval: a folder with tasks of one's own")
    add("--rows", type=int, help="so many rows at most, drawn with the seed")
    add(
        "--shots",
        help="gsm8k: a file of worked examples, Q: and A:; helm: their number (default 5, ranking 4), drawn with the seed",
    )
    add(
        "--which",
        choices=("full", "emu"),
        help="a run of offsite tuning: the adapter on the original model (default), or on the emulator",
    )
    add("--form", choices=("bare", "training"), help="gsm8k: Q and A, or the template of training; default bare with shots")
    add("--samples", type=int, help="humaneval: answers to each problem (5)")
    add("--k", type=int, nargs="+", default=[1], help="humaneval: pass@k for each of these")
    add("--allow_code_execution", action="store_true", help="humaneval: run the programs that the model writes, in a sandbox")
    add("--judge_url", help="judge: address of an OpenAI-compatible service, up to /v1; its key is read from FEDMPI_JUDGE_KEY")
    add("--judge_model", help="judge: the model that rates")
    add("--against", help="judge: the result of --task answers of the model to compare with")
    add("--max_new_tokens", type=int)
    add("--temperature", type=float, help="0 is greedy")
    add("--top_k", type=int)
    add("--top_p", type=float)
    machine_options(parser)
    add("--transport", choices=("auto", "torch", "mpi"), default="auto", help="where the environment is ambiguous")
    add("--out", type=Path, help="folder for the result; default RUN_DIR/evaluations, or evaluations/MODEL")
    add("--again", action="store_true", help="discard a result of this task that is there already")
    return parser


def machine_options(parser: argparse.ArgumentParser) -> None:
    """What every command that asks a model takes."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)


def set_up(given: argparse.Namespace) -> None:
    """Check and apply them."""
    import torch

    if given.batch_size < 1 or given.threads < 1:
        raise ConfigError(f"--batch_size {given.batch_size} and --threads {given.threads} must be at least 1")
    torch.set_num_threads(given.threads)


def run(given: argparse.Namespace) -> int:
    """Open, ask, write."""
    from fedmpi.hosting.host import pick_device
    from fedmpi.run import open_transport

    set_up(given)
    world = from_environment(os.environ, given.transport)
    target = open_target(given.target, given.out, given.which)
    given.task = default_task(target.data.name) if given.task == "auto" else given.task
    device = pick_device(given.device, world.local_rank)
    if given.task.startswith("lm_eval:"):
        if world.size > 1:
            raise ConfigError("--task lm_eval runs in one process: start it without a launcher")
        return harness(target, given, device)
    with open_transport(world, TIMEOUT_S) as transport:
        return ask_all(target, given, device, transport)


def ask_all(target: Target, given: argparse.Namespace, device: str, transport: "Transport | None") -> int:
    """The questions of a task, shared by the ranks that there are; rank 0 keeps and shows the result."""
    from fedmpi.evaluation.speaker import open_speaker
    from fedmpi.evaluation.task import Options
    from fedmpi.evaluation.tasks import Subject, build
    from fedmpi.federation import shards
    from fedmpi.federation.post import Post
    from fedmpi.hosting.emulation import open_model
    from fedmpi.result import Result, answered, show

    wanted = {key: value for key, value in vars(given).items() if key in Options.__dataclass_fields__}
    options = Options(**{**wanted, "k": tuple(given.k)})
    task = build(Subject(options, models.load_tokenizer(target.model), target.data, target.clients, target.seed))
    result = Result(target.out, options.task.replace(":", "-").replace("/", "_"), target.facts(device), task)
    post = None if transport is None else Post(transport)
    asked = (target.model, target.adapter, device, given.batch_size, open_model)
    speaker = cache(lambda: open_speaker(*asked))  # not where nothing is asked
    if post is not None and post.transport.rank != shards.HEAD:
        shards.help_out(post, lambda chunk: answered(task, speaker(), chunk))
        return FINISHED
    found = None if given.again else result.finished()
    with result.held() if found is None else nullcontext():
        if given.again:
            result.discard()
        found = found or result.finished()  # another process may have made it before this one had the lock
        if found is None:
            chunk = 1 if options.judge_url else given.batch_size * CHUNK  # ratings may cost money: few are asked for twice
            found = result.make(speaker(), chunk, post)
        else:
            list(shards.handed_out(post, [], lambda chunk: {}))
    show(found, result.path)
    return FINISHED


def harness(target: Target, given: argparse.Namespace, device: str) -> int:
    """A task of lm-evaluation-harness; it cannot be interrupted and gone on with."""
    from fedmpi.evaluation.harness import evaluate
    from fedmpi.hosting.emulation import structure_of
    from fedmpi.record.checkpoint import write_atomically

    if kinds := structure_of(target.model):
        raise ConfigError(
            f"lm_eval opens models as transformers does, which knows nothing of this emulator's parts ({', '.join(kinds)}): take a "
            "task of our own"
        )
    name = given.task.partition(":")[2]
    found = evaluate(name, given.data, target.model, target.adapter, device, given.batch_size, given.rows)
    path = target.out / f"lm_eval-{name.replace('/', '_')}.json"
    write_atomically(path, json.dumps({"task": given.task, "subject": target.facts(device), **found}, indent=1, default=str) + "\n")
    print(json.dumps(found["results"], indent=1, default=str))
    print(f"  all outputs: {path}", flush=True)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
