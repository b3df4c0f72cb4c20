"""Where ranks meet: a store whose keeper is frozen ends who asks it, since nothing else could."""

import threading
from typing import Any

import pytest

from fedmpi.transports import torch_dist


class Store:
    def __init__(self, answers: threading.Event) -> None:
        self.answers = answers

    def add(self, key: str, num: int) -> int:
        self.answers.wait(20)
        return num


def test_who_is_not_answered_ends_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes: list[int] = []
    answers = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        answers.set()

    monkeypatch.setattr(torch_dist.os, "_exit", end)
    store: Any = Store(answers)
    assert torch_dist.Asking(store, "rank 1 of 3", 0.1).add("asked", 1) == 1
    assert codes == [1] and "rank 1 of 3 got no answer from the job's store for 0.1 s" in capsys.readouterr().err
    assert torch_dist.Asking(store, "rank 1 of 3", 0.1).add("asked", 2) == 2
    threading.Event().wait(0.3)
    assert codes == [1], "an answer that comes ends nothing"
