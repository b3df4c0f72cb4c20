"""Ranks as threads of one process: the in-process transport carries what the real ones carry, so a test can run eight ranks."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fedmpi.federation.post import Post
from fedmpi.run import Program
from fedmpi.settings import recipe as recipes
from fedmpi.settings.recipe import Recipe
from fedmpi.stop import Stop
from fedmpi.training import Hook
from fedmpi.transports import in_process
from fedmpi.world import World


@dataclass(frozen=True)
class Stops(Hook):
    """At the turn that a test names, counted over all ranks, a rank is told to stop as by a signal."""

    left: ClassVar[int] = -1
    tell: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def before_fit(self, model: Any) -> None:
        Stops.left -= 1
        if Stops.left == 0:
            Stops.tell()


HERE = threading.local()  # the transport of the rank that a thread is


@contextmanager
def stepping_back() -> Iterator[None]:
    """What a rank does that is a thread while it hangs: the others compute."""
    turn = HERE.transport.turn
    turn.__exit__(None, None, None)
    try:
        yield
    finally:
        turn.__enter__()


STOPS = f"--train.hooks=[{__name__}.Stops]"


def recipe(*arguments: str) -> Recipe:
    """A recipe from command-line arguments."""
    return recipes.read(list(arguments), "test", "")[0]


def run(wanted: Recipe, folder: Path, size: int = 1, stop_rank: int | None = None, stop_turn: int = 0) -> list[Any]:
    """Run a recipe with `size` ranks; gives every rank's exit code, or what it raised. With STOPS among the recipe's hooks, rank
    `stop_rank` is told to stop at turn `stop_turn`."""
    wanted = replace(wanted, run_dir=str(folder))
    if size == 1:
        return [program(wanted, 0, 1).run()]
    results: list[Any] = [None] * size
    transports = in_process.open_all(size, timeout_s=wanted.timeout_s)
    Stops.left = stop_turn
    if stop_rank is not None:
        Stops.tell = staticmethod(transports[stop_rank].want_stop)

    def rank(number: int) -> None:
        HERE.transport = transports[number]
        try:
            with transports[number] as transport, transport.turn:
                own = program(wanted, number, size, Post(transport))
                own.stop.share(transport.want_stop, transport.stop_wanted)
                results[number] = own.run()
        except BaseException as error:  # noqa: BLE001 - a test looks at it
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def program(wanted: Recipe, rank: int, size: int, post: Post | None = None) -> Program:
    """One rank's program, not yet run."""
    world = World(launcher="none", rank=rank, size=size, local_rank=rank, local_size=size, transport="in_process")
    return Program(wanted, recipes.algorithm(wanted.algorithm).Config(), world, Stop(), post)


def adapter(folder: Path) -> bytes:
    """The bytes that placements and launchers must agree on."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


Work = Callable[[Any], Any]
