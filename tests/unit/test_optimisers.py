"""Server optimisers against Algorithm 2 of Reddi et al., written out in numpy, and the check that comes before any aggregate."""

import numpy as np
import pytest
import torch

from fedmpi.aggregation import ServerConfig
from fedmpi.aggregation.optimisers import step
from fedmpi.errors import ConfigError

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


@pytest.mark.parametrize(("key", "value"), [("lr", 0.0), ("momentum", 1.0), ("beta2", -0.1), ("tau", 0.0)])
def test_impossible_settings_name_their_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"server.{key} is {value}"):
        ServerConfig(**{key: value})
