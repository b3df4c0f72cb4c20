"""The exact mean against numbers worked out by hand, a float64 reference, and itself in every other order."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmpi.tensors
from fedmpi.aggregation import exact_mean, grid_scale, largest
from fedmpi.aggregation import mean as module
from fedmpi.aggregation import pieces as cutting
from fedmpi.aggregation.pieces import Piece
from fedmpi.errors import NonFinite, TrainingError

SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Sent:
    tensors: dict[str, torch.Tensor]
    weight: int


def sent(weight: int, *values: float, dtype: torch.dtype = torch.float32) -> Sent:
    return Sent({"x": torch.tensor(values, dtype=dtype)}, weight)


def drawn(seed: int, count: int, spread: float = 1.0) -> list[Sent]:
    """Updates of three tensors with unequal weights; their magnitudes differ a lot, as those of adapters do."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        exponents = torch.randint(-20, 1, shape, generator=generator)
        return torch.randn(shape, generator=generator) * torch.pow(2.0, exponents) * spread

    weights = torch.randint(1, 2000, (count,), generator=generator).tolist()
    return [Sent({"a": values(3, 5), "b": values(7), "c": values(2, 2)}, weight) for weight in weights]


def scale_of(updates: Sequence[Sent]) -> int:
    return grid_scale(sum(u.weight for u in updates), max(largest(u.tensors) for u in updates))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, the sign of zero too."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in left
    )


def test_values_worked_out_by_hand() -> None:
    mean = exact_mean([sent(1, 1.0, -2.0), sent(3, 5.0, 2.0)], scale=20)
    assert mean["x"].tolist() == [(1 * 1 + 3 * 5) / 4, (-2 + 3 * 2) / 4]


def test_one_update_is_its_own_mean() -> None:
    update = sent(7, 0.5, -0.25, 3.0)
    assert same(exact_mean([update], scale=30), update.tensors)


def test_what_cancels_leaves_nothing() -> None:
    """A plain float32 sum of these in this order gives 0; the exact one keeps the small value."""
    mean = exact_mean([sent(1, 2.0**20), sent(1, 2.0**-8), sent(2, -(2.0**19))], scale=24)
    assert mean["x"].tolist() == [2.0**-8 / 4]


def test_a_tie_goes_to_the_even_grid_step() -> None:
    halves = [sent(1, 0.5), sent(1, 1.5), sent(1, 2.5), sent(1, -0.5)]
    assert exact_mean(halves, scale=0)["x"].tolist() == [(0 + 2 + 2 + 0) / 4]


@given(SEEDS, SIZES, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_any_order_gives_the_same_bits(seed: int, count: int, random: object) -> None:
    updates = drawn(seed, count)
    scale = scale_of(updates)
    expected = exact_mean(updates, scale)
    random.shuffle(updates)  # type: ignore[attr-defined]
    assert same(exact_mean(updates, scale), expected)


@given(st.lists(st.sampled_from([0.5, -0.5, 1.5, 2.5, -1.5, 0.25]), min_size=2, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_ties_do_not_depend_on_the_order(values: list[float], random: object) -> None:
    """A sum that is rounded as a whole would round ties by its own parity, which depends on what was added before."""
    updates = [sent(1, value) for value in values]
    expected = exact_mean(updates, scale=0)
    random.shuffle(updates)  # type: ignore[attr-defined]
    assert same(exact_mean(updates, scale=0), expected)


@given(SEEDS, st.integers(2, 6), st.integers(1, 5))
@settings(max_examples=30)
def test_partial_sums_of_any_grouping_are_those_of_the_flat_sum(seed: int, count: int, cut: int) -> None:
    """In units of the grid every partial sum is a whole number that float64 holds, whoever adds it up."""
    updates = drawn(seed, count)
    scale, total = scale_of(updates), sum(u.weight for u in updates)
    expected = exact_mean(updates, scale)
    for name in expected:
        terms = [torch.round(u.tensors[name].double() * math.ldexp(u.weight, scale)) for u in updates]
        left, right = sum(terms[:cut], torch.zeros(())), sum(terms[cut:], torch.zeros(()))
        grouped = ((left + right) / math.ldexp(total, scale)).to(torch.float32)
        assert torch.equal(grouped, expected[name])


@given(SEEDS, SIZES, st.sampled_from([2.0**-6, 1.0, 2.0**6]))
@settings(max_examples=30)
def test_the_error_is_that_of_rounding_to_float32(seed: int, count: int, spread: float) -> None:
    """Against exact fractions: half a unit in the last place of float32, and the grid, which is far finer than the largest."""
    updates = drawn(seed, count, spread)
    scale, total = scale_of(updates), sum(u.weight for u in updates)
    grid = 2.0**-scale * len(updates) / total  # each term is off by at most half a step, and the sum is divided
    for name, found in exact_mean(updates, scale).items():
        for place, value in enumerate(found.view(-1).tolist()):
            exact = sum(Fraction(u.tensors[name].view(-1)[place].item()) * u.weight for u in updates) / total
            assert abs(Fraction(value) - exact) <= Fraction(abs(value)) / 2**24 + Fraction(grid)
    most = max(largest(u.tensors) for u in updates)
    assert grid <= max(1.0, most) * 2.0**-40


@pytest.mark.parametrize(("total_weight", "most"), [(1, 0.0), (1, 1.0), (52_000, 0.02), (10**6, 7.5), (2**31, 900.0)])
def test_the_scale_is_the_finest_that_cannot_overflow(total_weight: int, most: float) -> None:
    scale = grid_scale(total_weight, most)
    steps = total_weight * 64 * max(most, 1.0) * 2.0**scale
    assert 2.0**51 / 2 < steps <= 2.0**52  # one bit is left for the rounding of the terms


def test_64_times_the_largest_fits_and_far_more_is_an_error() -> None:
    scale = grid_scale(4, 1.0)
    assert exact_mean([sent(1, 64.0), sent(3, 64.0)], scale)["x"].tolist() == [64.0]
    with pytest.raises(TrainingError, match="64-fold"):
        exact_mean([sent(1, 64.0), sent(3, 200.0)], scale)


def test_an_overflow_by_many_small_terms_is_found_too() -> None:
    with pytest.raises(TrainingError, match="overflow"):
        exact_mean([sent(1, 2.0**50)] * 9, scale=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    fine = Sent({"a": torch.ones(3), "b": torch.ones(2)}, 1)
    with pytest.raises(NonFinite, match="tensor b holds"):
        exact_mean([fine, Sent({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, 1)], scale=20)
    with pytest.raises(NonFinite, match="tensor b holds"):
        largest({"a": torch.ones(3), "b": torch.tensor([bad, 1.0])})


def test_the_largest_is_a_magnitude() -> None:
    assert largest({"a": torch.tensor([1.0, -4.0]), "b": torch.empty(0), "c": torch.tensor([3.0])}) == 4.0
    assert largest({}) == 0.0


def test_nothing_with_a_weight_is_an_error() -> None:
    for nothing in ([], [sent(0, 1.0)]):
        with pytest.raises(TrainingError, match="at least one update"):
            exact_mean(nothing, scale=20)


def test_updates_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(KeyError, match="surplus"):
        exact_mean([sent(1, 1.0), Sent({"y": torch.ones(1)}, 1)], scale=20)
    with pytest.raises(TrainingError, match=r"tensor x is \(1,\)"):
        exact_mean([sent(1, 1.0, 2.0), sent(1, 1.0)], scale=20)
    with pytest.raises(TrainingError, match=r"float64 in one update"):
        exact_mean([sent(1, 1.0), sent(1, 1.0, dtype=torch.float64)], scale=20)


def test_the_result_keeps_shapes_dtypes_and_empty_tensors() -> None:
    tensors = {"half": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.empty(0, 4), "scalar": torch.tensor(2.0)}
    mean = exact_mean([Sent(tensors, 2), Sent(tensors, 1)], scale=20)
    assert {name: (t.shape, t.dtype) for name, t in mean.items()} == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    assert mean["scalar"].item() == 2.0 and mean["half"].tolist() == tensors["half"].tolist()


def test_adapters_of_all_sizes_take_the_same_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are added together, large ones by blocks, larger sums lie elsewhere: none of it may show in the bits."""
    updates = [Sent({n: t.repeat(40) if n == "b" else t for n, t in u.tensors.items()}, u.weight) for u in drawn(5, 4)]
    scale = scale_of(updates)
    expected = exact_mean(updates, scale)
    for block, large in ((8, 1), (16, 1 << 30), (1 << 15, 1)):
        monkeypatch.setattr(module, "_BLOCK", block)
        monkeypatch.setattr(cutting, "TOGETHER", block)
        monkeypatch.setattr(fedmpi.tensors, "LARGE_BYTES", large)
        assert same(exact_mean(updates, scale), expected)


def test_tensors_side_by_side_take_the_same_arithmetic() -> None:
    """As views of one buffer, in the order of their names or in another, and as tensors of their own."""
    updates = drawn(9, 3)
    expected = exact_mean(updates, scale=30)
    for names in ("abc", "cab"):
        views = []
        for update in updates:
            flat = torch.cat([torch.zeros(1), *(update.tensors[name].reshape(-1) for name in names)])
            parts = torch.split(flat[1:], [update.tensors[name].numel() for name in names])
            shaped = {name: part.view_as(update.tensors[name]) for name, part in zip(names, parts, strict=True)}
            views.append(Sent({name: shaped[name] for name in "abc"}, update.weight))
        for mixed in (views, [updates[0], *views[1:]], [views[0], *updates[1:]]):
            assert same(exact_mean(mixed, scale=30), expected)


def test_updates_are_consumed_one_at_a_time_and_left_as_they_are() -> None:
    open_now: list[int] = []
    updates = drawn(1, 4)
    before = [{name: tensor.clone() for name, tensor in u.tensors.items()} for u in updates]

    def arriving() -> object:
        for index, update in enumerate(updates):
            open_now.append(index)
            yield update
            assert open_now.pop() == index and not open_now

    exact_mean(arriving(), scale_of(updates))  # type: ignore[arg-type]
    assert all(same(kept, update.tensors) for kept, update in zip(before, updates, strict=True))


@dataclass(frozen=True)
class InPieces:
    """Updates whose pieces alternate, `step` elements at a time; the stream breaks after `most` pieces."""

    updates: list[Sent]
    step: int
    most: int = 1 << 30

    def pieces(self) -> Iterator[Piece]:
        like = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.updates[0].tensors.items()}
        flat = [torch.cat([tensor.reshape(-1) for tensor in update.tensors.values()]) for update in self.updates]
        starts = [(start, number) for start in range(0, len(flat[0]), self.step) for number in range(len(flat))]
        for count, (start, number) in enumerate(starts):
            if count == self.most:
                raise ConnectionError("a link broke")
            yield Piece(number, self.updates[number].weight, like, start, flat[number][start : start + self.step])


@pytest.mark.parametrize("step", [1, 4, 5, 100])
def test_updates_in_pieces_take_the_same_arithmetic(step: int) -> None:
    updates = drawn(3, 4)
    assert same(exact_mean(InPieces(updates, step), scale=30), exact_mean(updates, scale=30))


def test_where_an_update_breaks_off_there_is_no_mean() -> None:
    with pytest.raises(ConnectionError, match="a link broke"):
        exact_mean(InPieces(drawn(3, 2), 4, most=5), scale=30)


@pytest.mark.parametrize("dtypes", [*itertools.permutations((torch.float16, torch.float32, torch.float64))])
def test_the_mean_of_any_types_is_made_in_the_memory_of_its_sums(
    dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counting(num: int, dtype: torch.dtype, to_lend: bool = False) -> torch.Tensor:
        asked.append(num * dtype.itemsize)
        return fedmpi.tensors.room(num, dtype, to_lend)

    monkeypatch.setattr(module, "room", counting)
    monkeypatch.setattr(module, "_BLOCK", 4)
    monkeypatch.setattr(cutting, "TOGETHER", 4)
    generator = torch.Generator().manual_seed(0)
    drawn = [
        {str(n): torch.randn(n, generator=generator).to(dtype) for n, dtype in zip((9, 13, 6), dtypes, strict=True)}
        for _ in range(3)
    ]
    mean = exact_mean([Sent(tensors, weight) for weight, tensors in enumerate(drawn, start=1)], scale=30)
    for name, found in mean.items():
        steps = sum(weight * 2.0**30 * tensors[name].double() for weight, tensors in enumerate(drawn, start=1)).round()
        assert torch.equal(found, (steps / (6 * 2.0**30)).to(drawn[0][name].dtype))
    assert 8 * 28 <= sum(asked) < 8 * 28 + 2 * 8 and len({tensor.untyped_storage().data_ptr() for tensor in mean.values()}) == 1


def test_in_pieces_too_a_bad_value_is_named_and_an_overflow_found() -> None:
    fine, bad = drawn(3, 2)
    bad.tensors["b"][6] = math.nan
    with pytest.raises(NonFinite, match="tensor b holds"):
        exact_mean(InPieces([fine, bad], 4), scale=30)
    with pytest.raises(TrainingError, match="overflow"):
        exact_mean(InPieces([sent(1, 2.0**50, 1.0)] * 9, 1), scale=0)


def test_pieces_of_other_tensors_are_refused() -> None:
    @dataclass
    class Mixed:
        names: dict[str, int]

        def pieces(self) -> Iterator[Piece]:
            like = {name: torch.empty(1, device="meta") for name in "xy"}
            yield Piece(0, 1, like, 0, torch.ones(2))
            yield Piece(1, 1, {name: torch.empty(size, device="meta") for name, size in self.names.items()}, 0, torch.ones(1))

    with pytest.raises(TrainingError, match=r"tensor x is \(3,\)"):
        exact_mean(Mixed({"x": 3, "y": 1}), scale=20)
    with pytest.raises(TrainingError, match="another order"):
        exact_mean(Mixed({"y": 1, "x": 1}), scale=20)
