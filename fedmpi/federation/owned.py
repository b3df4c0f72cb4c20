"""State that clients own (kept optimisers, control variates, residuals) under the commit protocol: provisional until it counts.

With a vault it lies on disk and is read when its client's turn comes, so that hosting many clients costs no memory for it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedmpi.federation.updates import Vault
from fedmpi.round import Round, Verdict
from fedmpi.tensors import Tensors


@dataclass
class Owned:
    """The state of the clients of one rank. A member of a group keeps its own copy in memory: its leader writes the files."""

    vault: Vault | None
    writes: bool
    _counted: dict[int, "Tensors | str"] = field(default_factory=dict)
    _provisional: dict[int, "Tensors | str"] = field(default_factory=dict)

    def of(self, client: int) -> Tensors | None:
        """The state that counts."""
        state = self._counted.get(client)
        if isinstance(state, str):
            assert self.vault is not None
            return self.vault.get(client, state)
        return state

    def offer(self, client: int, state: Tensors) -> str:
        """State that a client made in this round; gives the digest that names it on disk."""
        if self.vault is None or not self.writes:
            self._provisional[client] = state
            return ""
        sha256 = self.vault.put(client, state)
        self._provisional[client] = sha256
        return sha256

    def settle(self, rnd: Round) -> None:
        """The next header tells whose updates counted; what did not count is forgotten, and the former state holds."""
        if rnd.verdict is Verdict.COUNTED:
            self._counted.update({client: state for client, state in self._provisional.items() if client in rnd.counted})
        self._provisional = {}

    def resume(self, named: Mapping[int, str], hosted: Collection[int]) -> None:
        """Take up what the last durable round names; a file that is missing or altered is found now, not rounds later."""
        if self.vault is None:
            return
        for client in set(named) & set(hosted):
            state = self.vault.get(client, named[client])
            self._counted[client] = named[client] if self.writes else state
