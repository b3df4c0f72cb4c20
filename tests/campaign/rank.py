"""What a launcher of the campaign starts: the program with the probe in it.

    python -m tests.campaign.rank FOLDER FAULTS.json NUM_THREADS ARGUMENTS...

With NUM_THREADS above 1 this process is all ranks, as threads.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from tests.campaign.faults import Fault


def main() -> int:
    """The exit code of the program."""
    folder, planned, num_threads, arguments = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    from tests.campaign import probe

    probe.install(folder / "events", [Fault(**fault) for fault in json.loads(planned.read_text())])
    if num_threads == 1:
        from fedmpi.run import main as program

        return program(arguments)
    return threads(arguments, num_threads)


def threads(arguments: list[str], size: int) -> int:
    """All ranks in this process; one stop for all, since they share the process's signals."""
    import torch

    from fedmpi import recipe as recipes
    from fedmpi.errors import FedmpiError
    from fedmpi.federation.post import Post
    from fedmpi.run import Program
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
    ranks = [threading.Thread(target=rank, args=pair) for pair in enumerate(opened)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    return max(results)


if __name__ == "__main__":
    sys.exit(main())
