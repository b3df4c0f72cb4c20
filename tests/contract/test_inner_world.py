"""Inside a client the world is the client: two groups of two train at the same time, with unequal step counts."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from inner_world_member import LAUNCHER, train, weights

from fedmpi import training
from fedmpi.errors import PeerLost, WorldError
from fedmpi.federation.lockstep import Federation
from fedmpi.round import place
from fedmpi.tensors import digest
from fedmpi.training import host, inner, join

MEMBER = Path(__file__).with_name("inner_world_member.py")
CLIENTS = {"client_a": 3, "client_bee": 11}  # steps


def start(*words: object) -> subprocess.Popen[str]:
    environment = os.environ | LAUNCHER | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(MEMBER.parents[2])}
    command = [sys.executable, str(MEMBER), *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(members: list[subprocess.Popen[str]], timeout_s: float = 150) -> None:
    try:
        for member in members:
            _, errors = member.communicate(timeout=timeout_s)
            assert member.returncode == 0, errors[-3000:]
    finally:
        for member in members:
            if member.poll() is None:
                member.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes left: two clients of two members, at the same time, on stores of their own."""
    path = tmp_path_factory.mktemp("inner")
    finish([start(path, role, rank, 2, steps) for role, steps in CLIENTS.items() for rank in range(2)])
    return path


def said(folder: Path, role: str) -> list[dict[str, object]]:
    return [json.loads((folder / f"{role}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("role", CLIENTS)
def test_members_end_with_equal_weights_and_counts(folder, role):
    first, second = said(folder, role)
    assert first == second
    assert first["steps"] == CLIENTS[role]


@pytest.mark.parametrize("role", CLIENTS)
def test_two_ranks_with_a_batch_are_one_rank_with_twice_the_batch(folder, role):
    alone, counts = train(role, CLIENTS[role], 2, {})
    first = said(folder, role)[0]
    for key in ("tokens", "supervised", "steps"):
        assert first[key] == counts[key]
    assert first["loss"] == pytest.approx(counts["loss"], abs=1e-5)
    assert first["last_loss"] == pytest.approx(counts["last_loss"], abs=1e-5)
    for name, value in torch.load(folder / f"{role}.0.weights", weights_only=True).items():
        torch.testing.assert_close(value, weights(alone)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("role", CLIENTS)
def test_the_rebuilt_world_shares_what_its_own_leader_has(folder, role):
    sent = {"b": torch.arange(3, dtype=torch.bfloat16), "a": torch.full((2, 2), float(len(role)))}
    for member in said(folder, role):
        assert member["shared"] == digest(sent)
        assert (member["text"], member["empty"]) == (f"from the leader of {role}", 0)


def test_after_a_member_broke_the_others_see_it_and_the_next_generation_trains(tmp_path):
    finish([start(tmp_path, "client_broken", rank, 2, 5) for rank in range(2)])
    first, second = said(tmp_path, "client_broken")
    assert first == second
    assert (first["steps"], first["in_time"], first["generation"]) == (5, True, 1)
    assert first["first"] == "RuntimeError: this member broke"


def test_a_client_of_one_rank_needs_nobody():
    hosted = host()
    world = join(hosted.address, 0, 1, 0, 20, role="alone")
    try:
        with pytest.raises(WorldError, match="alone: torch's default process group is taken"):
            join(hosted.address, 0, 1, 1, 20, role="alone")
        shared = world.share({"a": torch.ones(2)})
        assert torch.equal(shared["a"], torch.ones(2)) and world.share({}) == {}
    finally:
        world.leave()


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 0.4), ("cuda:0", 0.8)])
def test_a_member_that_does_not_end_its_turn_is_named_in_time(device, seconds):
    """On GPUs it may be in a collective with a member that left, which NCCL sees at its timeout only."""
    hosted = host()
    world = join(hosted.address, 0, 1, 0, 9.0, role="alone")
    world.size, world.timeout_s, world.device = 2, 0.4, device  # the other one came and hangs now
    try:
        with pytest.raises(PeerLost, match=rf"members \[1\] did not end their turn within {seconds} s of this one"):
            world.settle(None)
    finally:
        world.leave()


@pytest.mark.parametrize(("gpus", "shared"), [("aa", "0, 1"), ("ab", "")])
def test_members_on_one_gpu_are_refused_before_nccl_is_asked(monkeypatch, gpus, shared):
    """Where each has its own, it is NCCL that is asked next, which is not here."""
    monkeypatch.setattr(inner, "_gpu", lambda device: gpus[int(device[-1])])
    asked = []
    monkeypatch.setattr(inner.dist, "init_process_group", lambda **settings: asked.append(settings["backend"]))
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT")
    hosted = host()
    with ThreadPoolExecutor() as pool:
        joining = [
            pool.submit(join, hosted.address, rank, 2, 0, 10.0, role="ranks 1 to 2", device=f"cuda:{rank}") for rank in (0, 1)
        ]
        failed = [one.exception() for one in joining]
    if shared:
        assert {str(error).partition(":")[0] for error in failed} == {"ranks 1 to 2"} and not asked
        assert all(
            isinstance(error, WorldError) and f"members {shared} of one client would share a GPU" in str(error) for error in failed
        )
    else:
        assert failed == [None, None] and asked == ["cpu:gloo,cuda:nccl"] * 2 and os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"


def test_a_group_meets_where_it_computes(monkeypatch):
    told = []
    monkeypatch.setattr(training, "join", lambda *place, **more: told.append(more["device"]))
    federation = Federation(place(2, 5, 2), 3, device="cuda:1")
    federation._meeting._sit_down("localhost:1", 9.0)
    assert told == ["cuda:1"]


def test_a_member_that_never_comes_is_named_in_time():
    hosted = host()
    with pytest.raises(PeerLost) as caught:
        join(hosted.address, 0, 2, 3, 1.0, role="half")
    message = str(caught.value)
    assert message.startswith("inner world of half, generation 3, member 0 of 2 could not meet the others at ")
    assert "within 1.0 s" in message and "\n" not in message
