"""Memory that is used again: only when nobody can see it any more."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from fedmpi import tensors
from fedmpi.tensors import room, save_file

NUM = tensors.LARGE_BYTES // 4 + 12_345  # of a size that no other test asks for


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    first = room(NUM, torch.float32)
    place = first.data_ptr()
    del first
    assert room(NUM, torch.float32).data_ptr() == place
    assert room(2 * NUM - 1, torch.int16).data_ptr() == place


def test_memory_that_anybody_holds_is_left_alone() -> None:
    first = room(NUM, torch.float32).fill_(1)
    view, seen, place = first[10:20], first.numpy().data, first.data_ptr()
    del first
    assert room(NUM, torch.float32).fill_(2).data_ptr() != place
    del view
    assert room(NUM, torch.float32).data_ptr() != place and seen[0] == 1
    del seen
    assert place in {one.data_ptr() for one in [room(NUM, torch.float32) for _ in range(2)]}


def test_idle_memory_goes_back_in_time(monkeypatch: object) -> None:
    kept = room(NUM, torch.float32)
    before = len(tensors._rooms)
    del kept
    tensors._rooms[-1].used -= 2 * tensors.KEPT_S
    big = room(4 * NUM, torch.float32)
    assert len(tensors._rooms) <= before and big.numel() == 4 * NUM


def test_small_memory_is_the_allocators() -> None:
    before = len(tensors._rooms)
    assert room(0, torch.float64).shape == (0,) and room(7, torch.int8).dtype == torch.int8
    assert len(tensors._rooms) == before


def test_what_has_two_names_is_saved_under_both(tmp_path: Path) -> None:
    """What a server decoded is its emulator, and what the next difference is taken from."""
    both = torch.arange(6.0)
    save_file({"a": both[:3], "b": both[3:], "c": both[:3], "d": both[3:].view(3, 1)}, tmp_path / "file")
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "file").items()} == {
        **{"a": [0, 1, 2], "b": [3, 4, 5], "c": [0, 1, 2]},
        "d": [[3], [4], [5]],
    }
