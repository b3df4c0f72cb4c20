"""Server optimisers against Algorithm 2 of Reddi et al., written out in numpy, and the check that comes before any aggregate."""

import math

import numpy as np
import pytest
import torch

from fedmpi.aggregation import Config, ServerConfig, inspect
from fedmpi.aggregation.optimisers import step
from fedmpi.aggregation.step import FAR, MEDIAN
from fedmpi.errors import ConfigError, NonFinite, TrainingError

SETTINGS = ServerConfig(lr=0.1, momentum=0.8, beta2=0.95, tau=0.01)


def rounds(name: str) -> list[np.ndarray]:
    """Four rounds in which the clients' mean lies at a random place; gives the adapter after each."""
    adapter, memory, found = {"x": torch.zeros(5)}, {}, []
    for index in range(4):
        target = {"x": torch.from_numpy(np.random.default_rng(index).normal(size=5)).float()}
        adapter, memory = step(name, SETTINGS, adapter, target, memory)
        found.append(adapter["x"].double().numpy())
    return found


def written_out(name: str) -> list[np.ndarray]:
    x, m, v, found = np.zeros(5), np.zeros(5), np.full(5, 0.01**2), []
    for index in range(4):
        delta = np.random.default_rng(index).normal(size=5) - x
        if name == "avgm":
            m = 0.8 * m + delta
            x = x + 0.1 * m
        else:
            m = 0.8 * m + 0.2 * delta
            v = {
                "adagrad": v + delta**2,
                "yogi": v - 0.05 * delta**2 * np.sign(v - delta**2),
                "adam": 0.95 * v + 0.05 * delta**2,
            }[name]
            x = x + 0.1 * m / (np.sqrt(v) + 0.01)
        found.append(x)
    return found


@pytest.mark.parametrize("name", ["avgm", "adam", "yogi", "adagrad"])
def test_steps_are_those_of_the_paper(name: str) -> None:
    for found, expected in zip(rounds(name), written_out(name), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_an_optimiser_the_mean_is_the_adapter() -> None:
    target = {"x": torch.ones(2)}
    assert step("none", ServerConfig(), {"x": torch.zeros(2)}, target, {}) == (target, {})


def test_what_did_not_move_keeps_its_moments() -> None:
    """RoLoRA's idle factor is not carried on by the momentum of the round before."""
    still, memory = {"a": torch.ones(2), "b": torch.ones(2)}, {}
    after, memory = step("avgm", SETTINGS, still, {"a": torch.zeros(2), "b": torch.ones(2)}, memory)
    assert after["b"].tolist() == [1.0, 1.0] and set(memory) == {"first/a"}


def test_a_fair_update_passes() -> None:
    inspect({"x": torch.ones(2)}, {"x": torch.zeros(2)}, Config(most_norm=1.5), {})


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"y": torch.ones(2)}, TrainingError, r"lacks \['x'\] and brings \['y'\]"),
        ({"x": torch.ones(3)}, TrainingError, r"x is \(3,\)"),
        ({"x": torch.ones(2, dtype=torch.float16)}, TrainingError, "float16"),
        ({"x": torch.tensor([1.0, math.nan])}, NonFinite, "x holds"),
        ({"x": torch.tensor([1.0, math.inf])}, NonFinite, "x holds"),
        ({"x": torch.tensor([30.0, 40.0])}, TrainingError, "moved by 50, aggregation.most_norm allows 2"),
    ],
)
def test_others_are_refused(tensors: dict[str, torch.Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        inspect(tensors, {"x": torch.zeros(2)}, Config(most_norm=2.0), {})


def test_an_adaptive_bound_goes_by_the_round_before() -> None:
    far, origin = {"x": torch.full((1,), 2.1)}, {"x": torch.zeros(1)}
    adaptive = Config(most_norm="adaptive")
    inspect(far, origin, adaptive, {})
    with pytest.raises(TrainingError, match="allows 2"):
        inspect(far, origin, adaptive, {MEDIAN: torch.tensor(2.0 / FAR)})


@pytest.mark.parametrize(("key", "value"), [("lr", 0.0), ("momentum", 1.0), ("beta2", -0.1), ("tau", 0.0)])
def test_impossible_settings_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"server.{key} is {value}"):
        ServerConfig(**{key: value})
