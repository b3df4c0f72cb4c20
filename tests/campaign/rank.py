"""One process of a run: the program with the probe in it. It is one rank, or all of them as threads.

FOLDER/plan.json has the faults, the updates that are lost whatever happens, and the protections to do without.
"""

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.campaign.faults import Fault

GRACE_S = 8.0  # what a launcher leaves to the other ranks when one has failed


def run(folder: Path, arguments: list[str], num_threads: int = 1) -> int:
    """The exit code of the program, with its probe."""
    from tests.campaign import probe, unprotected

    planned = json.loads((folder / "plan.json").read_text())
    unprotected.switch_off(planned["without"])
    faults = [Fault(**fault) for fault in planned["faults"]]
    probe.install(folder / "events", faults, planned["lost"], num_threads > 1)
    if num_threads > 1:
        return threads(arguments, num_threads)
    from fedmpi.run import main as program

    return program(arguments)


def threads(arguments: list[str], size: int) -> int:
    """All ranks in this process; one stop for all, since they share the process's signals."""
    import torch

    from fedmpi.errors import FedmpiError
    from fedmpi.federation.post import Post
    from fedmpi.run import Program
    from fedmpi.settings import recipe as recipes
    from fedmpi.stop import Stop
    from fedmpi.transports import in_process
    from fedmpi.world import World

    wanted, own = recipes.read(arguments, "campaign", "")
    torch.set_num_threads(1)
    stop, results = Stop(), [1] * size
    stop.install()

    def rank(number: int, transport: Any) -> None:
        world = World(launcher="none", rank=number, size=size, local_rank=number, local_size=size, transport="in_process")
        try:
            with transport, transport.turn:
                results[number] = Program(wanted, own, world, stop, Post(transport)).run()
        except FedmpiError as error:
            print(f"rank {number}: {error}", file=sys.stderr, flush=True)

    opened = in_process.open_all(size, timeout_s=wanted.timeout_s)
    ranks = [threading.Thread(target=rank, args=pair, daemon=True) for pair in enumerate(opened)]
    for thread in ranks:
        thread.start()
    _wait(ranks, results)
    return max(results)


def _wait(ranks: list[threading.Thread], results: list[int]) -> None:
    """Until all have ended; a while after the first that failed, as a launcher does it."""
    ends = math.inf
    while time.monotonic() < ends and any(thread.is_alive() for thread in ranks):
        for thread, code in zip(ranks, results, strict=True):
            thread.join(0.02)
            if not thread.is_alive() and code and ends == math.inf:
                ends = time.monotonic() + GRACE_S
