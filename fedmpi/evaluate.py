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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi import data, models, recipe
from fedmpi.command import FINISHED, guarded
from fedmpi.errors import ConfigError
from fedmpi.world import from_environment

if TYPE_CHECKING:
    from fedmpi.evaluation.decoding import Speaker
    from fedmpi.evaluation.task import Task
    from fedmpi.federation.post import Post
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
    add("--data", help="the task's file or folder")
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


@dataclass(frozen=True)
class Target:
    """Who is scored: the base, the adapter on it if any, and how its data were made."""

    model: models.Config
    adapter: Path | None
    data: data.Config
    clients: int | None
    seed: int
    out: Path

    def facts(self) -> dict[str, Any]:
        """For the record: never a path of this machine."""
        from fedmpi.checkpoint import file_sha256

        adapter = None if self.adapter is None else file_sha256(self.adapter / "adapter_model.safetensors")
        return {"model": models.public_name(self.model), "dtype": self.model.dtype, "adapter_sha256": adapter}


def open_target(path: str, out: Path | None, which: str | None = None) -> Target:
    """A run folder is known by its config.yaml; everything else is a model."""
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        if which is not None:
            raise ConfigError(
                f"--which {which}: {path} is no run folder; it chooses between the two models of a run of offsite tuning"
            )
        model = models.Config(path)
        name = models.public_name(model).replace("/", "_").replace(":", "_")
        return Target(model, None, data.Config(), None, 0, out or Path("evaluations") / name)
    wanted = recipe.of_run(folder)
    if which is not None and not (folder / "emulator").is_dir():
        raise ConfigError(f"--which {which}: {folder} is no run of offsite tuning (it has no emulator/)")
    if which == "emu":
        base = replace(wanted.model, path=str(folder / "emulator"))
        emu = folder / "adapter_emu"
        if not (emu / "adapter_model.safetensors").is_file():
            raise ConfigError(f"{folder} has no adapter_emu/ yet: the run has not finished (see state.json); go on with it first")
        return Target(base, emu, wanted.data, wanted.clients, wanted.seed, out or folder / "evaluations" / "emu")
    adapter = folder / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        if parts := sorted(path.parent for path in folder.glob("clients/*/adapter")):
            raise ConfigError(f"{folder} holds {len(parts)} clients trained alone: give one of them, such as {parts[0]}")
        raise ConfigError(f"{folder} has no adapter/ yet: the run has not finished (see state.json); go on with it first")
    return Target(wanted.model, adapter, wanted.data, wanted.clients, wanted.seed, out or folder / "evaluations")


def default_task(name: str) -> str:
    """What a data set is scored with, where a user names no task."""
    fixed = data.FEDERATED.get(name)
    known = {"gsm8k": "gsm8k", "builtin:toy": "exact_match"}
    return fixed.task if fixed else known.get(name, "perplexity")


def run(given: argparse.Namespace) -> int:
    """Open, ask, write."""
    from fedmpi.host import pick_device
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

    wanted = {key: value for key, value in vars(given).items() if key in Options.__dataclass_fields__}
    options = Options(**{**wanted, "k": tuple(given.k)})
    task = build(Subject(options, models.load_tokenizer(target.model), target.data, target.clients, target.seed))
    result = Result(target.out, options.task.replace(":", "-").replace("/", "_"), target.facts(), task)
    post = None if transport is None else Post(transport)
    speaker = cache(lambda: open_speaker(target.model, target.adapter, device, given.batch_size))  # not where nothing is asked
    if post is not None and post.transport.rank != shards.HEAD:
        shards.help_out(post, lambda chunk: answered(task, speaker(), chunk))
        return FINISHED
    found = result.finished(given.again)
    if found is None:
        found = result.make(speaker(), given.batch_size * CHUNK, post)
    else:
        list(shards.handed_out(post, [], lambda chunk: {}))
    show(found, result.path)
    return FINISHED


def answered(task: "Task", speaker: "Speaker", chunk: Sequence[int]) -> dict[str, Any]:
    """What a rank tells of a chunk: its records, and what they cost."""
    before = getattr(speaker, "seconds", 0.0), getattr(speaker, "cut", 0)
    records = task.ask(speaker, chunk)
    after = getattr(speaker, "seconds", 0.0), getattr(speaker, "cut", 0)
    return {"records": records, "model_seconds": after[0] - before[0], "prompts_cut": after[1] - before[1]}


def harness(target: Target, given: argparse.Namespace, device: str) -> int:
    """A task of lm-evaluation-harness; it cannot be interrupted and gone on with."""
    from fedmpi.checkpoint import write_atomically
    from fedmpi.evaluation.harness import evaluate

    name = given.task.partition(":")[2]
    found = evaluate(name, target.model, target.adapter, device, given.batch_size, given.rows)
    path = target.out / f"lm_eval-{name.replace('/', '_')}.json"
    write_atomically(path, json.dumps({"task": given.task, "subject": target.facts(), **found}, indent=1, default=str) + "\n")
    print(json.dumps(found["results"], indent=1, default=str))
    print(f"  all outputs: {path}", flush=True)
    return FINISHED


@dataclass(frozen=True)
class Result:
    """One evaluation on disk: records one by one in NAME.jsonl while it runs, NAME.json when it is done."""

    folder: Path
    name: str
    subject: Mapping[str, Any]
    task: "Task"

    @property
    def path(self) -> Path:
        """The finished result."""
        return self.folder / f"{self.name}.json"

    @property
    def part(self) -> Path:
        """The records so far; its first line says of what."""
        return self.folder / f"{self.name}.jsonl"

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as plain values."""
        facts: dict[str, Any] = json.loads(json.dumps({"subject": self.subject, **self.task.facts()}))
        return facts

    def finished(self, again: bool) -> dict[str, Any] | None:
        """The result that is there already, if it is of the same settings."""
        if again:
            self.path.unlink(missing_ok=True)
            self.part.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        self._same(found["settings"], self.path)
        return found

    def make(self, speaker: "Speaker", chunk: int, post: "Post | None" = None) -> dict[str, Any]:
        """Ask what is not answered yet, with the help of other ranks where there are any, and finish.

        A chunk is asked whole or not at all: who else is in a batch moves a loss by the noise of a forward pass.
        """
        from fedmpi.checkpoint import write_atomically
        from fedmpi.federation.shards import handed_out
        from fedmpi.host import environment

        began, known = time.monotonic(), self._known()
        ids = self.task.ids
        chunks = [list(range(start, min(start + chunk, len(ids)))) for start in range(0, len(ids), chunk)]
        missing = [one for one in chunks if any(ids[index] not in known for index in one)]
        costs = {"model_seconds": 0.0, "prompts_cut": 0}
        with _appending(self.part) as file:
            for told in handed_out(post, missing, partial(answered, self.task, speaker)):
                for record in told["records"]:
                    known[record["id"]] = record
                    file.write(json.dumps(record) + "\n")
                file.flush()
                costs = {key: costs[key] + told[key] for key in costs}
        records = [known[name] for name in ids]
        result = {
            "task": self.name,
            **self.task.score(records),
            "settings": self.settings(),
            "seconds": time.monotonic() - began,
            **costs,
            "asked_now": sum(map(len, missing)),
            "ranks": 1 if post is None else post.transport.size,
            **environment(),
            "records": records,
        }
        write_atomically(self.path, json.dumps(result, indent=1) + "\n")
        self.part.unlink()
        return result

    def _known(self) -> dict[str, dict[str, Any]]:
        """Records of an interrupted evaluation; the file is begun where there is none."""
        from fedmpi.checkpoint import write_atomically
        from fedmpi.folder import read_lines

        lines = list(read_lines(self.part))
        if lines:
            self._same(lines[0]["settings"], self.part)
        whole = [{"settings": self.settings()}, *lines[1:]]  # a last line that was cut short is gone from here on
        write_atomically(self.part, "".join(json.dumps(line) + "\n" for line in whole))
        return {line["id"]: line for line in lines[1:]}

    def _same(self, found: Mapping[str, Any], path: Path) -> None:
        wanted = self.settings()
        if differ := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
            raise ConfigError(
                f"{path} is of other settings ({', '.join(differ)} differ): give --again to discard it, or --out for another folder"
            )


def _appending(path: Path) -> Any:
    from fedmpi.checkpoint import writing

    with writing(str(path), "make room or give another --out"):
        return path.open("a", encoding="utf-8")


def show(result: Mapping[str, Any], path: Path) -> None:
    """The scores, in lines."""
    interval = result.get("interval") or {}
    between = f" ({interval['low']:.4f} to {interval['high']:.4f}, {interval['method']})" if interval.get("low") is not None else ""
    score = result.get("score")
    print(f"{result['task']}: {'no score' if score is None else f'{score:.4f}'}{between}")
    for key, value in result.items():
        if isinstance(value, int | float) and key not in ("score", "seconds", "model_seconds", "asked_now", "ranks", "threads"):
            print(f"  {key}: {value:.4f}" if isinstance(value, float) else f"  {key}: {value}")
    if worst := result.get("worst_client"):
        print(f"  worst client: {worst['client']} (loss {worst['loss']:.4f} over {worst['num_tokens']} tokens)")
    print(f"  all outputs: {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
