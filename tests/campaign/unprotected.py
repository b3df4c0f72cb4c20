"""The program without one of its protections, so that it can be shown that the checker sees what that protection is for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.campaign import faults
from tests.campaign.faults import Fault


def no_checksum() -> None:
    """Every frame is believed."""
    from fedmpi.transports import link

    link.check_frame = lambda *_: None


def no_finite_check() -> None:
    """A value that is no number is not noticed by those who look at updates, nor by the mean."""
    from fedmpi.aggregation import check, mean

    check.magnitude = mean.magnitude = lambda values: float(values.nan_to_num().abs().max())


def no_atomic_rename() -> None:
    """A checkpoint is written where it will be looked for."""
    from fedmpi.record import checkpoint

    commit = checkpoint.Checkpoints.commit

    def in_place(self: Any, round_index: int, tensors: Any, record: Any, owned: Any) -> None:
        final = self.folder / f"round-{round_index:06d}"
        final.mkdir(parents=True, exist_ok=True)
        checkpoint.save_file(tensors, final / "state.safetensors")
        checkpoint.sync(final / "state.safetensors")
        commit(self, round_index, tensors, record, owned)

    checkpoint.Checkpoints.commit = in_place  # type: ignore[method-assign]


def no_round_check() -> None:
    """An update counts whatever round it is of, and however often it comes."""
    from fedmpi.federation.arrivals import Arrivals

    Arrivals._belongs = lambda *_: None  # type: ignore[method-assign]


def no_commit_protocol() -> None:
    """State that a client made counts at once, also where its update did not, and nobody tidies up after it."""
    from fedmpi.federation.owned import Owned
    from fedmpi.record.checkpoint import Checkpoints

    settle = Owned.settle

    def settles(self: Owned, rnd: Any) -> None:
        self._counted.update(self._provisional)
        settle(self, rnd)

    Owned.settle, Checkpoints.forget = settles, lambda *_: None  # type: ignore[method-assign, assignment]


def no_deadline() -> None:
    """Whoever is silent is waited for."""
    from fedmpi.transports.watchdog import Watchdog

    Watchdog.look = lambda *_: None  # type: ignore[method-assign]


def for_ever() -> None:
    """A rank that stops does not come back by itself."""
    faults.LONG_PAUSE = 1e3


PROTECTIONS: Mapping[str, tuple[Callable[[], None], Fault]] = {
    "checksum": (no_checksum, Fault("flip", "upload", 2, 1)),
    "finite check": (no_finite_check, Fault("nan", "upload", 2, 1)),
    "atomic rename": (no_atomic_rename, Fault("kill", "commit", 2, 0)),
    "round check": (no_round_check, Fault("again", "upload", 2, 1)),
    "commit protocol": (no_commit_protocol, Fault("nan", "upload", 2, 1)),
    "deadline": (no_deadline, Fault("freeze", "train", 2, 1)),
}


def switch_off(names: Sequence[str]) -> None:
    """Do without these from now on."""
    for name in names:
        for_ever() if name == "return" else PROTECTIONS[name][0]()
