"""Robust rules against independent numpy on whole vectors, and against ByzFL where it is installed (development only)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedmpi.aggregation import Config, robust
from fedmpi.aggregation.spool import Spool
from fedmpi.aggregation.step import Start, aggregate
from fedmpi.errors import ConfigError
from fedmpi.tensors import Tensors

NUM, HOSTILE = 11, 3
Vectors = np.ndarray


@dataclass(frozen=True)
class Sent:
    client: int
    tensors: Tensors
    weight: int = 1


def moves(seed: int = 0, num: int = NUM) -> Vectors:
    """Rows around a common direction, three of them far off."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(num, 40)) * 0.3 + random.normal(size=40)
    rows[:HOSTILE] = random.normal(size=(HOSTILE, 40)) * 5
    return rows.astype(np.float32).astype(np.float64)


def combined(rows: Vectors, config: Config, memory: Tensors | None = None) -> tuple[Vectors, Tensors]:
    """What the program makes of updates that moved by these rows."""
    sent = {"a": torch.zeros(4, 6), "b": torch.zeros(16)}
    with Spool(None) as spool:
        for client in reversed(range(len(rows))):
            row = torch.from_numpy(rows[client]).float()
            spool.fill([Sent(client, {"a": row[:24].view(4, 6), "b": row[24:]})])
        after, kept = robust.combine(spool, sent, config, memory or {})
    return torch.cat([after["a"].reshape(-1), after["b"]]).double().numpy(), kept


def distances(rows: Vectors) -> Vectors:
    return np.linalg.norm(rows[:, None] - rows[None], axis=2)


def median(rows: Vectors) -> Vectors:
    return np.median(rows, axis=0)


def trimmed_mean(rows: Vectors) -> Vectors:
    return np.sort(rows, axis=0)[HOSTILE:-HOSTILE].mean(0)


def krum(rows: Vectors) -> Vectors:
    return rows[np.argmin((np.sort(distances(rows), axis=1)[:, 1 : len(rows) - HOSTILE] ** 2).mean(1))]


def multi_krum(rows: Vectors) -> Vectors:
    scores = (np.sort(distances(rows), axis=1)[:, 1 : len(rows) - HOSTILE] ** 2).mean(1)
    return rows[np.argsort(scores)[: len(rows) - HOSTILE]].mean(0)


def geometric_median(rows: Vectors) -> Vectors:
    z = np.zeros(rows.shape[1])
    for _ in range(10):
        inverse = 1 / np.maximum(np.linalg.norm(rows - z, axis=1), robust.NU)
        z = (rows * inverse[:, None]).sum(0) / inverse.sum()
    return z


def clipping(rows: Vectors) -> Vectors:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows * np.minimum(1, 2.0 / lengths)).mean(0)


def centred_clipping(rows: Vectors) -> Vectors:
    v = np.zeros(rows.shape[1])
    for _ in range(10):
        ways = rows - v
        v = v + (ways * np.minimum(1, 2.0 / np.linalg.norm(ways, axis=1, keepdims=True))).mean(0)
    return v


def mixed(rows: Vectors) -> Vectors:
    near = np.argsort(distances(rows), axis=1)[:, : len(rows) - HOSTILE]
    return rows[near].mean(1)


RULES: dict[str, Callable[[Vectors], Vectors]] = {
    rule.__name__: rule for rule in (median, trimmed_mean, krum, multi_krum, geometric_median, clipping, centred_clipping)
}


def settings(name: str, mixing: bool) -> Config:
    return Config(robust=name, mixing=mixing, hostile=0.27, radius=2.0 if "clipping" in name else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_figures_are_those_of_an_independent_implementation(name: str, mixing: bool) -> None:
    for seed in range(5):
        rows = moves(seed)
        expected = RULES[name](mixed(rows) if mixing else rows)
        found, _ = combined(rows, settings(name, mixing))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_figures_are_those_of_byzfl(name: str, mixing: bool) -> None:
    pytest.importorskip("byzfl", reason="ByzFL is not installed (development only: it brings torchvision)")
    from byzfl.aggregators import aggregators, preaggregators

    theirs = {
        "median": aggregators.Median(),
        "trimmed_mean": aggregators.TrMean(f=HOSTILE),
        "krum": aggregators.Krum(f=HOSTILE),
        "multi_krum": aggregators.MultiKrum(f=HOSTILE),
        "geometric_median": aggregators.GeometricMedian(nu=robust.NU, T=10),
        "clipping": lambda rows: aggregators.Average()(preaggregators.Clipping(c=2.0)(rows)),
        "centred_clipping": aggregators.CenteredClipping(L=10, tau=2.0),
    }
    rows = moves(7)
    expected = theirs[name](preaggregators.NNM(f=HOSTILE)(rows.copy()) if mixing else rows.copy())
    found, _ = combined(rows, settings(name, mixing))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", RULES)
def test_far_updates_do_not_carry_the_aggregate_away(name: str) -> None:
    rows = moves(1)
    honest = rows[HOSTILE:].mean(0)
    rows[:HOSTILE] = 1e4
    config = Config(robust=name, mixing=name == "clipping")  # type: ignore[arg-type]
    assert np.linalg.norm(combined(rows, config)[0] - honest) < np.linalg.norm(honest)
    assert np.linalg.norm(rows.mean(0) - honest) > 100 * np.linalg.norm(honest)


def test_an_even_number_has_two_in_the_middle() -> None:
    rows = moves(2, num=8)
    np.testing.assert_allclose(combined(rows, Config(robust="median"))[0], np.median(rows, axis=0), rtol=1e-6)


def test_centred_clipping_goes_on_from_where_it_was() -> None:
    first, memory = combined(moves(3), settings("centred_clipping", False))
    rows = moves(4)
    v = first
    for _ in range(10):
        ways = rows - v
        v = v + (ways * np.minimum(1, 2.0 / np.linalg.norm(ways, axis=1, keepdims=True))).mean(0)
    found, _ = combined(rows, settings("centred_clipping", False), memory)
    np.testing.assert_allclose(found, v, rtol=1e-5, atol=1e-6)


def test_blocks_are_no_part_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("median", "multi_krum"):
        whole, _ = combined(moves(5), settings(name, True))
        monkeypatch.setattr(robust, "BLOCK", 5)
        np.testing.assert_allclose(combined(moves(5), settings(name, True))[0], whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "num", "expected"), [(0.25, 8, 2), (0.25, 9, 3), (0.25, 1, 0), (0.3, 10, 3), (0.49, 2, 0), (0, 5, 0)]
)
def test_the_hostile_are_a_minority(share: float, num: int, expected: int) -> None:
    assert robust.num_hostile(share, num) == expected


def test_the_aggregate_starts_from_what_was_sent() -> None:
    sent = {"x": torch.tensor([10.0, 20.0])}
    arrived = [Sent(client, {"x": sent["x"] + client}, 1) for client in range(3)]
    made = aggregate(arrived, Start(sent, {}, 40, Config(robust="median")))
    assert made.adapter["x"].tolist() == [11.0, 21.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"robust": "median", "rule": "fedex"}, "aggregation.robust median .* rule fedex"),
        ({"hostile": 0.5}, "aggregation.hostile is 0.5"),
        ({"mixing": True}, "aggregation.mixing"),
        ({"radius": 1.0}, "aggregation.radius"),
        ({"radius": -1.0, "robust": "clipping"}, "aggregation.radius is -1.0"),
        ({"iterations": 0}, "aggregation.iterations is 0"),
        ({"most_norm": 0.0}, "aggregation.most_norm is 0.0"),
    ],
)
def test_impossible_settings_name_their_key(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**arguments)  # type: ignore[arg-type]
