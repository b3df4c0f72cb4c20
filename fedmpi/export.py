"""Write what a run trained as a model folder that needs no adapter.

    python -m fedmpi.export RUN_DIR --merge                    into RUN_DIR/merged: weights, config and tokenizer for transformers
    python -m fedmpi.export RUN_DIR --merge --out FOLDER

Exit codes: 0 done, 1 failed, 2 not possible.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmpi import models
from fedmpi.command import FINISHED, guarded
from fedmpi.errors import ConfigError
from fedmpi.target import open_target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    given = _parser().parse_args(arguments)
    return guarded(lambda: run(given), "export")


def _parser() -> argparse.ArgumentParser:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fedmpi.export", description=__doc__, formatter_class=about)
    parser.add_argument("run_dir", type=Path, help="the folder of a run")
    parser.add_argument("--merge", action="store_true", help="write the adapter into the weights: W0 + BA")
    parser.add_argument("--out", type=Path, help="folder for the model; default RUN_DIR/merged")
    return parser


def run(given: argparse.Namespace) -> int:
    """Open, merge, write; a folder that is there was written whole."""
    target, out = open_target(str(given.run_dir), None), given.out or given.run_dir / "merged"
    if not given.merge:
        raise ConfigError(f"{given.run_dir}/adapter is what the run left; say --merge for a model folder without an adapter")
    if target.adapter is None:
        raise ConfigError(f"{given.run_dir} is no run folder: it has no config.yaml")
    if out.exists():
        raise ConfigError(f"--out {out} is there already: give another folder, or remove it")
    model: Any = models.merged(models.load_in_full(target.model), target.adapter)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with models.without_optional():  # a model on its way to a file is in no engine's hands
        model.save_pretrained(part)
    models.load_tokenizer(target.model).save_pretrained(part)
    part.rename(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters in {str(model.dtype).removeprefix('torch.')}")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
