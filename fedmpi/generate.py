"""Read what a run's models say to a prompt, side by side.

    python -m fedmpi.generate RUN_DIR --prompt "Name three colours" --compare base,local,fed

base is the model without an adapter, fed the federation's, global that of all data in one place, local every client's own
(local:3 client 3's), and a name of the run's own `compare` that algorithm's federation's.
Exit codes: 0 done, 1 failed, 2 not possible.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmpi import data, models
from fedmpi.command import FINISHED, guarded
from fedmpi.errors import ConfigError
from fedmpi.evaluate import machine_options, set_up
from fedmpi.settings import recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    given = _parser().parse_args(arguments)
    return guarded(lambda: run(given), "generate")


def run(given: argparse.Namespace) -> int:
    """Ask all, then print what each says."""
    for prompt, voices in answers(given):
        print(f"\n> {prompt}")
        for title, text in voices:
            print(f"\n[{title}]\n{text.strip()}", flush=True)
    return FINISHED


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fedmpi.generate", description=__doc__, formatter_class=about)
    add = parser.add_argument
    add("run_dir", type=Path, help="the folder of a run")
    add("--prompt", action="append", required=True, help="an instruction; may be given several times")
    add("--input", default="", help="the instructions' input")
    add("--compare", default="base,fed", help="who speaks: of base, fed, global, local, local:CLIENT, or one that the run compared")
    add(
        "--which",
        choices=("full", "emu"),
        default="full",
        help="after offsite tuning: speak with the original model, or the emulator",
    )
    add("--max_new_tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top_k", type=int, default=0, help="0 is all")
    add("--top_p", type=float, default=1.0)
    machine_options(parser)
    return parser


def answers(given: argparse.Namespace) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each prompt what each of the models says. The base is loaded once and takes every adapter in turn."""
    from fedmpi.evaluation.decoding import Decoding
    from fedmpi.evaluation.speaker import ModelSpeaker
    from fedmpi.hosting.emulation import open_model
    from fedmpi.hosting.host import pick_device

    set_up(given)
    decoding = Decoding(given.max_new_tokens, given.temperature, given.top_k, given.top_p, given.seed)
    wanted = recipe.of_run(given.run_dir)
    emulated = given.which == "emu"
    if emulated and not (given.run_dir / "emulator").is_dir():
        raise ConfigError(f"--which emu: {given.run_dir} is no run of offsite tuning (it has no emulator/)")
    backbone = replace(wanted.model, path=str(given.run_dir / "emulator")) if emulated else wanted.model
    others = tuple(map(recipe.short, wanted.compare))
    voices = list(find_voices(given.run_dir, wanted.scenario, given.compare, "adapter_emu" if emulated else "adapter", others))
    tokenizer: Any = models.load_tokenizer(backbone)
    base: Any = open_model(backbone, pick_device(given.device, 0))
    prompts = [data.render(prompt, given.input, wanted.data.template, tokenizer) for prompt in given.prompt]
    said = []
    for _, folder in voices:
        with models.worn(base, folder) as model:
            said.append(ModelSpeaker(model, tokenizer, given.batch_size).say(prompts, decoding, given.prompt))
    titles = [title for title, _ in voices]
    return [
        (prompt, [(title, texts[i]) for title, texts in zip(titles, said, strict=True)]) for i, prompt in enumerate(given.prompt)
    ]


def find_voices(
    run_dir: Path, scenario: str, compare: str, adapter: str = "adapter", others: Sequence[str] = ()
) -> Iterator[tuple[str, Path | None]]:
    """Title and adapter folder, of that name, of each that is to speak; none for the base."""
    inside = {name: run_dir / name if scenario == "all" and name != "fed" else run_dir for name in ("local", "global", "fed")}
    for name in filter(None, (part.strip() for part in compare.split(","))):
        kind, _, client = name.partition(":")
        if kind == "base":
            yield name, None
        elif kind in ("fed", "global"):
            yield name, _there(inside[kind] / adapter, name, scenario in (kind, "all"), scenario)
        elif kind == "local":
            clients = inside["local"] / "clients"
            known = sorted((path for path in clients.glob(f"*/{adapter}")), key=lambda path: int(path.parent.name))
            chosen = [clients / client / adapter] if client else known or [clients / "0" / adapter]
            for folder in chosen:
                yield f"client {folder.parent.name} alone", _there(folder, name, scenario in ("local", "all"), scenario)
        elif name in others:
            yield name, _there(run_dir / name / adapter, name, True, scenario)
        else:
            raise ConfigError(f"--compare {name!r}: allowed are {', '.join(('base, fed, global, local, local:CLIENT', *others))}")


def _there(folder: Path, name: str, possible: bool, scenario: str) -> Path:
    if not possible or not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"--compare {name}: {folder} holds no adapter (the run's scenario is {scenario}, and it must have finished)"
        )
    return folder


if __name__ == "__main__":
    sys.exit(main())
