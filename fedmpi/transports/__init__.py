"""Who carries bytes between the ranks of a federation: TCP and lent memory, MPI, or threads of one process.

The door chooses by the world; torch and MPI are imported behind it. It must never know what the bytes mean.
"""

import importlib
from typing import TYPE_CHECKING, cast

from fedmpi.world import World

if TYPE_CHECKING:
    from fedmpi.transports.base import Transport

_MODULES = {"torch": "torch_dist", "mpi": "mpi", "in_process": "in_process"}


def open(world: World, *, timeout_s: float, apart: bool = False) -> "Transport":
    """This rank's transport, once every rank has arrived; who is missing after `timeout_s` is named on every rank.

    Ranks of one machine lend each other memory; `apart` has them behave as if each were on a machine of its own.
    """
    module = importlib.import_module(f"{__name__}.{_MODULES[world.transport]}")
    return cast("Transport", module.open(world, timeout_s=timeout_s, **({"apart": True} if apart else {})))
