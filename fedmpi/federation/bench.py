"""The bench: clients that failed several times in a row sit out some rounds.

Who sits where is a pure function of the record (who counted and who failed, round by round), so that a resumed run benches whom an
undisturbed one does. Only rounds that counted are looked at: an attempt that did not may be made again after a stop. A client that
was late, or whose rank was gone, has not failed.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

NO_FAILURES = ("Late", "PeerLost")


@dataclass
class Bench:
    """Failures in a row, and who may play again when."""

    after: int = 0  # failures in a row; 0: nobody is ever benched
    rounds: int = 0  # that a client then sits out
    _strikes: dict[int, int] = field(default_factory=dict)
    _until: dict[int, int] = field(default_factory=dict)

    def note(self, round_index: int, counted: Collection[int], failures: Mapping[int, str]) -> None:
        """What a round that counted came to."""
        for client in counted:
            self._strikes.pop(client, None)
        for client, why in failures.items():
            if why.partition(":")[0] in NO_FAILURES:
                continue
            self._strikes[client] = self._strikes.get(client, 0) + 1
            if self._strikes[client] == self.after:
                self._until[client] = round_index + 1 + self.rounds
                del self._strikes[client]

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """The same from the lines of metrics.jsonl."""
        for line in lines:
            if "counted" in line:
                failures = {int(client): str(why) for client, why in line["failures"].items()}
                self.note(line["round"], line["counted"], failures)

    def sitting(self, round_index: int) -> tuple[int, ...]:
        """Who sits out this round."""
        return tuple(sorted(client for client, until in self._until.items() if round_index < until))
