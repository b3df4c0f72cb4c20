"""Federations of one, side by side: what each party could do alone, and what could be done with all data in one place.

They are handed out by the same rounds and gather as everything else: one outer round, in which a client's whole work is a run
of its own.
"""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmpi.errors import QuorumLost
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.lockstep import Federation
from fedmpi.federation.updates import Update
from fedmpi.record.checkpoint import write_atomically
from fedmpi.round import SERVER, End, Round, place
from fedmpi.sessions.session import LEAST_LIMIT_BYTES

if TYPE_CHECKING:
    from fedmpi.federation.post import Post
    from fedmpi.hosting.host import Host
    from fedmpi.sessions.session import Session
    from fedmpi.stop import Stop
    from fedmpi.tensors import Tensors


@dataclass(frozen=True)
class Solo:
    """One job: a whole run with a single client."""

    id: int
    session: "Session"
    owned: "Tensors | None" = None


def run_solos(
    name: str,
    jobs: Mapping[int, Solo],
    experiment: str,
    seed: int,
    stop: "Stop",
    post: "Post | None",
    complete: Callable[[int, "Tensors"], Mapping[str, Any]] | None = None,
) -> tuple[End, dict[int, Any]]:
    """Run all jobs on whatever ranks there are; the server learns every job's final scores.

    With `complete` it gets the adapter as well, and adds what only it can tell of it.
    """
    rank, size = (SERVER, 1) if post is None else (post.transport.rank, post.transport.size)
    fed = Federation(place(len(jobs), size), rank, post)
    fed.greet(experiment, dict.fromkeys(fed.placement.hosted_by(rank), 1))
    if rank == SERVER:
        end = End.SIGNAL if stop.over() else End.NO
        fed.conductor = Conductor([1] * len(jobs), 1, seed, len(jobs), "all", "equal", len(jobs), "stop", end=end)
    fed.welcome({}, LEAST_LIMIT_BYTES + max(job.session.adapter_bytes for job in jobs.values()))
    finals: dict[int, Any] = {}
    ends: set[End] = set()
    for rnd in fed.rounds():
        for update in _ended(fed, rnd, jobs, name):
            ends.add(End(update.metrics["end"]))
            more = complete(update.client, update.tensors) if complete is not None and update.tensors else {}
            finals[update.client] = {**update.metrics["final"], **more}
            print(f"{name}: {len(finals)} of {len(jobs)} done", flush=True)
        if fed.conductor is not None and not fed.conductor.end:
            fed.conductor.end = _verdict(ends, stop)
    fed.farewell()
    return fed.end, finals


def _ended(fed: Federation, rnd: Round, jobs: Mapping[int, Solo], name: str) -> Iterator[Update]:
    """The jobs on the server as they come to an end; why others did not is printed."""
    try:
        for update in fed.gather(rnd, jobs, _run):
            if update.metrics["end"] == End.GIVEN_UP:
                print(f"fedmpi: {name}: client {update.client} gave up, its output says why", file=sys.stderr, flush=True)
            yield update
    except QuorumLost:
        if fed.conductor is None:
            raise
        print(f"fedmpi: {name}: {'; '.join(map(str, fed.outcome.failures.values()))}", flush=True)


def _verdict(ends: Collection[End], stop: "Stop") -> End:
    if End.GIVEN_UP in ends:
        return End.GIVEN_UP
    return End.SIGNAL if End.SIGNAL in ends or stop.wanted() else End.NO


def _run(job: Solo) -> Update:
    end, summary = job.session.train()
    adapter = job.session.adapter() if summary and job.session.host.split else {}
    return Update(job.id, adapter, {"end": int(end), "final": summary["final"] if summary else {}})


def completed(host: "Host", jobs: "Mapping[int, Session]", client: int, adapter: "Tensors") -> dict[str, Any]:
    """What a party that trained alone with an emulator cannot tell: how its adapter does on the original model."""
    assert host.original is not None
    full, path = host.original.base, jobs[client].path
    found = {**host.score(adapter, full), **host.answer(adapter, full)} if host.parties.heldout else {}
    full.save(adapter, path / "adapter")
    if (path / "summary.json").exists():
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        write_atomically(path / "summary.json", json.dumps({**summary, "final": {**summary["final"], **found}}, indent=2) + "\n")
    return found
