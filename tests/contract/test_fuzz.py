"""A short fuzzing of the receiver; the long one is a command of its own."""

import pytest

from tests.contract.fuzz_frames import fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_streams_are_refused_and_nothing_else_happens(seed: int) -> None:
    frames, refused = fuzz(20_000, seed)
    assert frames >= 20_000 and refused > 1000
