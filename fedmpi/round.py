"""Rounds: what a round is, who takes part in it, and which rank hosts whom. Pure; it never sends, trains or stores anything."""

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

import numpy as np

from fedmpi.errors import ConfigError, ProtocolError, WorldError
from fedmpi.seeding import seed_for

SERVER = 0  # the rank that serves


class Verdict(IntEnum):
    """What the server says of the round before."""

    NONE = 0  # there was none in this process group: the run starts or resumes here
    COUNTED = 1
    REPEAT = 2


class End(IntEnum):
    """Why no round follows."""

    NO = 0  # a round follows
    FINISHED = 1
    SIGNAL = 2  # somebody was told to stop; a restart goes on
    GIVEN_UP = 3  # too few clients were left


_FIXED = struct.Struct("<iiQiiBB")


@dataclass(frozen=True)
class Round:
    """One round as the server announced it. It carries no services, so that every rank holds the same value."""

    index: int
    attempt: int
    cohort: tuple[int, ...]
    seed: int
    scale: int  # the exact mean adds on the grid 2**-scale
    num_clients: int
    verdict: Verdict = Verdict.NONE
    counted: tuple[int, ...] = ()  # whose updates of the round before counted
    durable: int = -1  # the last round that is on disk
    end: End = End.NO  # anything else: read the verdict, then leave

    def pack(self) -> bytes:
        """The round header: of one size for a given number of clients."""
        fixed = _FIXED.pack(self.index, self.attempt, self.seed, self.scale, self.durable, int(self.verdict), int(self.end))
        return fixed + _bitmap(self.cohort, self.num_clients) + _bitmap(self.counted, self.num_clients)

    @staticmethod
    def unpack(data: bytes, num_clients: int) -> "Round":
        """Read a header back; a size that does not fit the number of clients is a disagreement, not a guess."""
        expected = _FIXED.size + 2 * _bitmap_bytes(num_clients)
        if len(data) != expected:
            raise ProtocolError(f"round header of {len(data)} bytes, expected {expected} for {num_clients} clients")
        index, attempt, seed, scale, durable, verdict, end = _FIXED.unpack_from(data)
        half = _FIXED.size + _bitmap_bytes(num_clients)
        cohort, counted = _members(data[_FIXED.size : half]), _members(data[half:])
        return Round(index, attempt, cohort, seed, scale, num_clients, Verdict(verdict), counted, durable, End(end))


def _bitmap_bytes(num_clients: int) -> int:
    return (num_clients + 7) // 8


def _bitmap(members: Sequence[int], num_clients: int) -> bytes:
    bits = np.zeros(_bitmap_bytes(num_clients) * 8, dtype=np.uint8)
    bits[list(members)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def _members(bitmap: bytes) -> tuple[int, ...]:
    bits = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little")
    return tuple(int(i) for i in np.flatnonzero(bits))


def cohort_size(clients_per_round: str | int | float | None, num_clients: int) -> int:
    """How many clients a round has: all of them, a number, or a share such as 0.05 (of which at least one)."""
    if clients_per_round is None:
        return num_clients
    text = str(clients_per_round)
    try:
        asked = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"clients_per_round {text!r}: give a whole number or a share between 0 and 1") from None
    if 0 < asked < 1 or (asked == 1 and "." in text):
        return max(1, int(asked * num_clients))
    if asked.denominator != 1 or asked < 1:
        raise ConfigError(f"clients_per_round {text}: give a whole number or a share between 0 and 1")
    if asked > num_clients:
        raise ConfigError(f"clients_per_round {text} of {num_clients} clients: at most {num_clients} can take part")
    return int(asked)


def fixed_cohort(sampling: str, num_clients: int) -> tuple[int, ...]:
    """The clients of `fixed:0,3,5`."""
    try:
        chosen = tuple(sorted(int(part) for part in sampling.removeprefix("fixed:").split(",")))
    except ValueError:
        raise ConfigError(f"sampling {sampling!r}: write the clients as fixed:0,3,5") from None
    if not 0 <= chosen[0] <= chosen[-1] < num_clients:
        raise ConfigError(f"sampling {sampling!r}: clients are numbered 0 to {num_clients - 1}")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"sampling {sampling!r}: name each client once")
    return chosen


def cohort_of(sampling: str, clients_per_round: str | int | float | None, num_clients: int) -> int:
    """How many clients a round of these settings has."""
    if sampling.startswith("fixed:"):
        return len(fixed_cohort(sampling, num_clients))
    return cohort_size(clients_per_round, num_clients)


def sample(
    sampling: str, size: int, weights: Sequence[int], seed: int, index: int, attempt: int, out: Collection[int] = ()
) -> tuple[int, ...]:
    """The cohort of a round: a pure function of seed, round, attempt and who sits it out, evaluated by the server alone."""
    num_clients = len(weights)
    named = fixed_cohort(sampling, num_clients) if sampling.startswith("fixed:") else range(num_clients)
    able = [client for client in named if client not in out]
    if sampling.startswith("fixed:") or sampling == "all" or size >= len(able):
        return tuple(able)
    rng = np.random.default_rng(seed_for(seed, "cohort", index, attempt))
    shares = np.asarray([weights[client] for client in able], dtype=np.float64) if sampling == "weighted" else None
    drawn = rng.choice(able, size, replace=False, p=None if shares is None else shares / shares.sum())
    return tuple(sorted(int(client) for client in drawn))


@dataclass(frozen=True)
class Placement:
    """Which ranks serve which clients. A seat is the ranks of one client at a time, its leader first."""

    seats: tuple[tuple[int, ...], ...]
    leader_of: tuple[int, ...]  # by client
    clustered: bool = False  # groups were asked for: inside each of them, one rank or many, the world is the client

    @property
    def leaders(self) -> tuple[int, ...]:
        """The ranks that speak for at least one client."""
        return tuple(sorted(set(self.leader_of)))

    def hosted_by(self, rank: int) -> tuple[int, ...]:
        """The clients that `rank` serves, as leader or as member."""
        leader = self.seat_of(rank)[0]
        return tuple(c for c, host in enumerate(self.leader_of) if host == leader)

    def seat_of(self, rank: int) -> tuple[int, ...]:
        """All ranks of the seat that `rank` belongs to; a rank without a seat sits alone and idles."""
        return next((seat for seat in self.seats if rank in seat), (rank,))


def place(num_clients: int, size: int, ranks_per_client: int = 1, groups: Sequence[int] = ()) -> Placement:
    """Place clients on ranks 1..size-1 in turn (rank 0 serves, and hosts all where it is alone)."""
    if num_clients < 1:
        raise ConfigError(f"clients {num_clients}: at least 1 is needed")
    clustered = bool(groups) or ranks_per_client > 1
    seats = ((0,),) if size == 1 and not clustered else _seats(size - 1, ranks_per_client, groups)
    if clustered and len(seats) > num_clients:
        raise WorldError(f"{len(seats)} groups of ranks for {num_clients} clients: start fewer ranks or give fewer groups")
    return Placement(seats, tuple(seats[c % len(seats)][0] for c in range(num_clients)), clustered)


def _seats(workers: int, ranks_per_client: int, groups: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    if ranks_per_client < 1 or any(size < 1 for size in groups):
        raise ConfigError(f"a client has at least 1 rank: ranks_per_client {ranks_per_client}, groups {list(groups)}")
    if groups and ranks_per_client > 1:
        raise ConfigError("give either ranks_per_client or groups, not both")
    sizes = list(groups) or [ranks_per_client] * (workers // ranks_per_client)
    if sum(sizes) != workers or not sizes:
        raise WorldError(
            f"groups {sizes or [ranks_per_client]} take {sum(sizes) or ranks_per_client} ranks besides the server, "
            f"but {workers} are there: start {(sum(sizes) or ranks_per_client) + 1} ranks or change the groups"
        )
    seats, first = [], 1
    for num in sizes:
        seats.append(tuple(range(first, first + num)))
        first += num
    return tuple(seats)
