"""A rank of the contract suite: opens a transport, runs cases, tells how they ended. Also the program that mpirun starts."""

import os
import sys
import traceback

import torch
import transport_cases

from fedmpi.errors import LinkError
from fedmpi.transports.base import Transport
from fedmpi.world import World

Report = list[tuple[str, str]]


def run_cases(t: Transport, names: list[str]) -> Report:
    """Each case's name with what it returned, or with a traceback that ends the list."""
    report: Report = []
    try:
        with t:
            for name in names:
                meet = name in {case.__name__ for case in transport_cases.GENTLE}
                report.append((name, str(getattr(transport_cases, name)(t) or "ok")))
                if meet:
                    transport_cases.meet(t)
    except BaseException:  # noqa: BLE001  the test judges what a rank says, whatever it is
        report.append((names[len(report)] if len(report) < len(names) else "close", traceback.format_exc()))
    return report


def world(transport: str, rank: int, size: int, port: int = 0) -> World:
    """The world of a test: all ranks on this machine."""
    store = f"127.0.0.1:{port}" if port else None
    return World("env", rank, size, rank, size, transport, store, hosts_store=rank == 0)  # type: ignore[arg-type]


def spawned_rank(names: list[str], rank: int, size: int, port: int, timeout_s: float, apart: bool, back: object) -> None:
    """A spawned process: sends its report, or the error of opening, back through a pipe."""
    from fedmpi.transports import shared, torch_dist

    torch.set_num_threads(1)
    shared.LENT_BYTES = transport_cases.CHUNK_BYTES // 2
    try:
        where, chunk_bytes = world("torch", rank, size, port), transport_cases.CHUNK_BYTES
        t = torch_dist.open(where, timeout_s=timeout_s, chunk_bytes=chunk_bytes, apart=apart)
    except LinkError as error:
        back.send([("open", str(error))])
    else:
        back.send(run_cases(t, names))


def mpi_rank(names: list[str], timeout_s: float, folder: str) -> int:
    """A rank under mpirun: leaves its report in a file, as mpirun may end it at any time."""
    from fedmpi.transports import mpi

    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    if names == ["absent"] and rank == size - 1:
        import time

        import mpi4py.MPI  # noqa: F401

        time.sleep(60)
    try:
        t = mpi.open(world("mpi", rank, size), timeout_s=timeout_s, chunk_bytes=transport_cases.CHUNK_BYTES, apart=True)
        report = run_cases(t, names)
    except LinkError as error:
        report = [("open", str(error))]
    with open(f"{folder}/{rank}", "w") as file:
        file.write(repr(report))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(mpi_rank(sys.argv[1].split(","), float(sys.argv[2]), sys.argv[3]))
