"""Scratch space keeps what it is given, in memory and in files, and a file that is used again shows nothing of what was there."""

import os
from pathlib import Path

import pytest

from fedmpi.aggregation import scratch
from fedmpi.aggregation.scratch import Scratch
from fedmpi.errors import CheckpointError


def got(space: Scratch, place: int, num: int) -> bytearray:
    found = bytearray(num)
    space.read(place, memoryview(found))
    return found


@pytest.mark.parametrize("limit", [0, 7, 1000])
def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", limit)
    space = Scratch(tmp_path)
    for place in (4, 0, 8):
        space.write(place, memoryview(bytes(range(place, place + 4))))
    space.write(2, memoryview(b"xy"))
    assert got(space, 0, 12) == bytes([0, 1]) + b"xy" + bytes(range(4, 12)) and got(space, 5, 2) == bytes([5, 6])
    space.close()
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_two_at_a_time_have_a_file_each_and_files_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 0)
    one, two = Scratch(tmp_path), Scratch(tmp_path)
    one.write(0, memoryview(b"one!"))
    two.write(0, memoryview(b"two"))
    assert got(one, 0, 4) == b"one!" and got(two, 0, 3) == b"two"
    with pytest.raises(EOFError, match="never written"):
        got(two, 0, 4)
    used = one._file
    one.close()
    three = Scratch(tmp_path)
    three.write(0, memoryview(b"3"))
    assert three._file is used and got(three, 0, 1) == b"3"


@pytest.mark.parametrize("in_run_folder", [True, False])
def test_a_full_disk_is_told_of_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_run_folder: bool) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(os, "pwrite", full)
    where = str(tmp_path) if in_run_folder else "TMPDIR sets where"
    with pytest.raises(CheckpointError, match=f"scratch space in .*{where}.* takes no more: No space left"):
        Scratch(tmp_path if in_run_folder else None).write(0, memoryview(b"more"))
