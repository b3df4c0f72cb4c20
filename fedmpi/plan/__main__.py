"""What a run would train, exchange, hold and compute, from shapes alone: no weights, no tokenizer, no data, no ranks.

    python -m fedmpi.plan --config RECIPE.yaml                 the options of fedmpi.run; of the model, config.json is enough
    python -m fedmpi.plan --config RECIPE.yaml --ranks 4 --link_mbps 100 --json

--ranks N is the number of ranks that clients are placed on (default one for each client, and the server), --json prints one JSON
object. Times of transfer are those of --link_mbps.
Exit codes: 0 done, 1 failed, 2 the settings are not possible.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from fedmpi.command import FINISHED, guarded
from fedmpi.plan.figures import build
from fedmpi.plan.table import show
from fedmpi.settings import recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    return guarded(lambda: _enter(sys.argv[1:] if arguments is None else list(arguments)), "plan")


def _enter(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedmpi.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int)
    own, rest = parser.parse_known_args(arguments)
    wanted, settings = recipe.read(rest, "python -m fedmpi.plan", __doc__ or "")
    plan = build(wanted, settings, own.ranks)
    print(json.dumps({**asdict(plan), "round_s": plan.round_s, "once_s": plan.once_s}, indent=1)) if own.json else show(plan)
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
