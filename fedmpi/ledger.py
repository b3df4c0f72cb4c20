"""The ledger: bytes that were sent, by direction, client and round. It counts what it is told and never sends."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Tensor payloads by client, and everything else (manifests, headers, greetings, frames) as control bytes."""

    up: Counter[int] = field(default_factory=Counter)  # this round, by client
    down: Counter[int] = field(default_factory=Counter)  # this round, by the client that the copy was for
    late_bytes: int = 0  # this round: of updates that came when their round was over
    asked_bytes: int = 0  # since the last round was closed: what was sent to be scored where the rows are
    totals: Counter[str] = field(default_factory=Counter)
    _told: int = 0  # of all bytes on the links, those that stand in a round

    def supplied(self, num_bytes: int) -> None:
        """What was handed out to clients that cannot read a model for themselves stands in no round."""
        self.totals["supply_bytes"] += num_bytes
        self._told += num_bytes

    def close_round(self, links: int = 0) -> dict[str, int]:
        """The round's figures, given all bytes that have been on the links so far; then the columns start anew."""
        carried = self.up.total() + self.down.total() + self.asked_bytes + self.late_bytes
        # a late update may be on the links in one round and be taken off them in the next
        control = max(0, links - self._told - carried) if links else 0
        self._told += carried + control if links else 0
        row = {"up_bytes": self.up.total(), "down_bytes": self.down.total(), "control_bytes": control}
        row |= {"scoring_bytes": self.asked_bytes} if self.asked_bytes else {}
        row |= {"late_bytes": self.late_bytes} if self.late_bytes else {}
        self.totals.update(row)
        self.up, self.down, self.late_bytes, self.asked_bytes = Counter(), Counter(), 0, 0
        return row
