"""Averages of products against dense numpy: what each rule applies, what it misses, and the error that it records of itself."""

import dataclasses
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedmpi.aggregation import Config, Made, Start, aggregate, narrowed, trained
from fedmpi.tensors import Tensors

MODULES = {"m.0.q": (12, 10), "m.1.v": (9, 14)}
RANK = 3


@dataclass(frozen=True)
class Sent:
    client: int
    tensors: Tensors
    weight: int


def drawn(seed: int, rank: int = RANK) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, inner) in MODULES.items():
        tensors[f"{module}.lora_A.default.weight"] = torch.randn(rank, inner, generator=generator)
        tensors[f"{module}.lora_B.default.weight"] = torch.randn(out, rank, generator=generator)
    return tensors


def start(rule: str, **more: object) -> Start:
    return Start(drawn(99), {}, 40, Config(rule=rule), **more)  # type: ignore[arg-type]


def updates(rule: str = "mean", index: int = 0, ranks: tuple[int, ...] = (3, 3, 3, 3)) -> list[Sent]:
    """What clients send; a factor that the rule leaves alone stays as it was sent, and at home."""
    made = []
    for client, rank in enumerate(ranks):
        tensors = {**narrowed(drawn(99), rank), **{name: drawn(client, rank)[name] for name in trained(drawn(0), rule, index)}}
        made.append(Sent(client, {name: tensors[name] for name in trained(tensors, rule, index)}, 3 + 2 * client))
    return made


def dense(tensors: Tensors, module: str) -> np.ndarray:
    a, b = (tensors[f"{module}.lora_{factor}.default.weight"].double().numpy() for factor in "AB")
    return b @ a


def ideal(sent: list[Sent], module: str) -> np.ndarray:
    """The weighted average of the products, each formed as a matrix."""
    total = sum(update.weight for update in sent)
    whole = [{**narrowed(drawn(99), _rank(update)), **update.tensors} for update in sent]
    return sum(update.weight / total * dense(tensors, module) for update, tensors in zip(sent, whole, strict=True))


def _rank(update: Sent) -> int:
    name, tensor = next(iter(update.tensors.items()))
    return len(tensor) if ".lora_A." in name else tensor.shape[1]


def applied(made: Made, module: str) -> np.ndarray:
    fold = made.fold
    extra = (fold[f"{module}/B"].double() @ fold[f"{module}/A"].double()).numpy() if f"{module}/A" in fold else 0.0
    return dense(made.adapter, module) + extra


def off(made: Made, sent: list[Sent]) -> float:
    """The relative error, worked out with dense matrices."""
    wrong = sum(((applied(made, module) - ideal(sent, module)) ** 2).sum() for module in MODULES)
    return float(np.sqrt(wrong / sum((ideal(sent, module) ** 2).sum() for module in MODULES)))


UNEQUAL = (3, 1, 2, 3)


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), UNEQUAL])
@pytest.mark.parametrize(("rule", "index"), [("ffa", 0), ("rolora", 0), ("rolora", 1), ("fedex", 0), ("flora", 0)])
def test_rules_that_are_exact_on_paper_are_exact_here(rule: str, index: int, ranks: tuple[int, ...]) -> None:
    sent = updates(rule, index, ranks)
    made = aggregate(sent, start(rule, fresh=lambda: {name: t * (".lora_A." in name) for name, t in drawn(5).items()}))
    assert off(made, sent) < 1e-6
    assert made.figures["aggregation_error"] < 1e-6


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), UNEQUAL])
@pytest.mark.parametrize("rule", ["mean", "flexlora"])
def test_rules_that_are_not_say_by_how_much(rule: str, ranks: tuple[int, ...]) -> None:
    sent = updates(rule, ranks=ranks)
    made = aggregate(sent, start(rule))
    assert made.figures["aggregation_error"] == pytest.approx(off(made, sent), rel=1e-6)
    assert made.figures["aggregation_error"] > 0.1


def test_nobody_needs_the_error() -> None:
    made = aggregate(updates(), dataclasses.replace(start("mean"), config=Config(record_error=False)))
    assert made.figures == {} and all(
        torch.equal(aggregate(updates(), start("mean")).adapter[n], t) for n, t in made.adapter.items()
    )


@pytest.mark.parametrize("rule", ["mean", "rolora", "fedex", "flora", "flexlora"])
def test_the_order_of_arrival_is_nothing(rule: str) -> None:
    sent = updates(rule, ranks=UNEQUAL)
    expected = aggregate(sent, start(rule, fresh=lambda: drawn(5)))
    random.Random(3).shuffle(sent)
    found = aggregate(sent, start(rule, fresh=lambda: drawn(5)))
    for left, right in ((expected.adapter, found.adapter), (expected.fold, found.fold)):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert expected.figures == found.figures


@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), UNEQUAL])
def test_flexlora_is_the_best_of_its_rank(ranks: tuple[int, ...]) -> None:
    sent = updates(ranks=ranks)
    made = aggregate(sent, start("flexlora"))
    for module in MODULES:
        u, values, v = np.linalg.svd(ideal(sent, module))
        best = (u[:, :RANK] * values[:RANK]) @ v[:RANK]
        np.testing.assert_allclose(dense(made.adapter, module), best, atol=1e-5)


class Sizes(TorchDispatchMode):
    """The largest tensor that anything makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        parts = made if isinstance(made, list | tuple) else [made]
        self.most = max(self.most, *(part.numel() for part in parts if isinstance(part, torch.Tensor)), 0)
        return made


@pytest.mark.parametrize("rule", ["mean", "ffa", "rolora", "fedex", "flora", "flexlora"])
def test_no_rule_forms_a_matrix_of_the_size_of_a_weight(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it aggregates nor for its error."""
    monkeypatch.setitem(MODULES, "m.0.q", (3000, 3000))
    sent = updates(rule, ranks=UNEQUAL)
    with Sizes() as sizes:
        made = aggregate(sent, start(rule, fresh=lambda: drawn(5)))
    assert "aggregation_error" in made.figures
    assert 3000 * RANK <= sizes.most < 3000 * 3000 / 50  # factors, and pieces of a mean


def test_unequal_ranks_count_as_zero_beyond_their_own() -> None:
    sent = updates(ranks=UNEQUAL)
    mean = aggregate(sent, start("mean")).adapter["m.0.q.lora_A.default.weight"]
    shares = [update.weight / sum(u.weight for u in sent) for update in sent]
    last = sum(shares[client] * sent[client].tensors["m.0.q.lora_A.default.weight"][2] for client in (0, 3))
    torch.testing.assert_close(mean[2], last)


def test_what_a_rule_trains() -> None:
    names = sorted(drawn(0))
    a, b = ([name for name in names if f".lora_{factor}." in name] for factor in "AB")
    assert trained(names, "mean", 1) == names
    assert [trained(names, "ffa", index) for index in (0, 1)] == [b, b]
    assert [trained(names, "rolora", index) for index in (0, 1, 2)] == [b, a, b]


def test_fedex_sends_as_much_as_its_clients_did() -> None:
    """The residual travels as factors whose rank is the sum of the clients' ranks."""
    fold = aggregate(updates(ranks=UNEQUAL), start("fedex")).fold
    assert {name: tuple(t.shape) for name, t in fold.items()} == {
        "m.0.q/A": (9, 10), "m.0.q/B": (12, 9), "m.1.v/A": (9, 14), "m.1.v/B": (9, 9),
    }  # fmt: skip


def test_large_updates_lie_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """In scratch space of the run, without a name, and with the same result."""
    monkeypatch.setattr("fedmpi.aggregation.scratch.IN_MEMORY_BYTES", 1)
    made, expected = aggregate(updates("fedex"), start("fedex", scratch=tmp_path)), aggregate(updates("fedex"), start("fedex"))
    assert all(torch.equal(made.fold[name], tensor) for name, tensor in expected.fold.items())
    assert list(tmp_path.iterdir()) == []
