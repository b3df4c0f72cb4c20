"""Splitters: every row in exactly one client, equal for equal seeds, and each with the property it is named for."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi.data.splitters import follow, split
from fedmpi.errors import DataError

SPLITTERS = ("iid", "meta", "dirichlet", "shards", "unequal_shards", "quantity", "root_verb")


def labels_of(sizes):
    return [name for name, size in sizes.items() for _ in range(size)]


def mixes(labels, dealt):
    return [Counter(labels[i] for i in rows) for rows in dealt]


def entropy(mix):
    total = sum(mix.values())
    return -sum(num / total * math.log(num / total) for num in mix.values())


@settings(max_examples=60)
@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=24, max_size=120),
    clients=st.integers(1, 12),
    splitter=st.sampled_from(SPLITTERS),
    seed=st.integers(0, 5),
    balance=st.booleans(),
)
def test_every_row_in_exactly_one_client_and_deterministic(labels, clients, splitter, seed, balance):
    options = {"alpha": 5.0, "balance": balance}
    try:
        dealt = split(labels, clients, splitter, seed, **options)
    except DataError as error:
        refused = {"dirichlet": "data.min_rows", "root_verb": "cannot be dealt whole"}
        assert refused[splitter] in str(error)
        return
    assert sorted(row for rows in dealt for row in rows) == list(range(len(labels)))
    assert len(dealt) == clients and all(rows == sorted(rows) for rows in dealt)
    assert dealt == split(labels, clients, splitter, seed, **options)


@pytest.mark.parametrize("splitter", ["iid", "dirichlet", "shards", "unequal_shards", "quantity"])
def test_another_seed_deals_otherwise(splitter):
    labels = labels_of({"a": 50, "b": 50})
    assert split(labels, 4, splitter, 0, alpha=5.0) != split(labels, 4, splitter, 1, alpha=5.0)


def test_iid_is_even():
    assert sorted(len(rows) for rows in split([""] * 11, 3, "iid", 0)) == [3, 4, 4]


def test_meta_one_category_each():
    labels = labels_of({"c": 5, "a": 3, "b": 4})
    assert mixes(labels, split(labels, 3, "meta", 0)) == [{"a": 3}, {"b": 4}, {"c": 5}]


def test_meta_merges_what_clients_lack_and_shares_what_categories_lack():
    labels = labels_of({"a": 3, "b": 4, "c": 5})
    assert mixes(labels, split(labels, 2, "meta", 0)) == [{"a": 3, "c": 5}, {"b": 4}]
    assert mixes(labels, split(labels, 5, "meta", 0)) == [{"a": 2}, {"b": 2}, {"c": 5}, {"a": 1}, {"b": 2}]


def test_shards_have_equal_volume_and_few_categories():
    labels = labels_of({"a": 50, "b": 30, "c": 20})
    dealt = split(labels, 10, "shards", 3, shards=2)
    assert [len(rows) for rows in dealt] == [10] * 10
    assert all(len(mix) <= 3 for mix in mixes(labels, dealt))
    with pytest.raises(DataError, match="20 rows are too few for 11 clients of 2 shards"):
        split(["a"] * 20, 11, "shards", 0, shards=2)


@settings(max_examples=60)
@given(
    rows=st.integers(20, 200),
    clients=st.integers(1, 10),
    min_rows=st.integers(1, 25),
    alpha=st.sampled_from([1e-300, 0.05, 1.0, 50.0]),
    splitter=st.sampled_from(["quantity", "unequal_shards"]),
)
def test_volumes_keep_their_minimum_or_say_that_they_cannot(rows, clients, min_rows, alpha, splitter):
    labels = ["ab"[i % 2] for i in range(rows)]
    least = max(min_rows, 2) if splitter == "unequal_shards" else min_rows
    if clients * least > rows:
        with pytest.raises(DataError, match="rows are too few for"):
            split(labels, clients, splitter, 0, alpha=alpha, min_rows=min_rows)
        return
    sizes = [len(part) for part in split(labels, clients, splitter, 0, alpha=alpha, min_rows=min_rows)]
    assert sum(sizes) == rows and min(sizes) >= least


@pytest.mark.parametrize("splitter", ["quantity", "unequal_shards"])
def test_small_alpha_makes_volumes_uneven(splitter):
    labels = labels_of(dict.fromkeys("abcd", 250))
    deviations = []
    for alpha in (0.1, 1.0, 100.0):
        sizes = [len(part) for seed in range(5) for part in split(labels, 8, splitter, seed, alpha=alpha)]
        deviations.append(sum((size - 125) ** 2 for size in sizes))
    assert deviations[0] > deviations[1] > deviations[2]


def test_quantity_leaves_the_mix_of_categories_as_it_is():
    labels = labels_of({"a": 800, "b": 200})
    for mix in mixes(labels, split(labels, 4, "quantity", 0, alpha=1.0, min_rows=100)):
        assert mix["a"] / sum(mix.values()) == pytest.approx(0.8, abs=0.12)


def test_unequal_shards_have_few_categories_and_unequal_volumes():
    labels = labels_of(dict.fromkeys("abcdefgh", 100))
    dealt = split(labels, 10, "unequal_shards", 1, shards=2, alpha=0.5, min_rows=10)
    sizes = sorted(len(rows) for rows in dealt)
    assert sizes[0] >= 10 and sizes[-1] > 3 * sizes[0]
    spans = [len(mix) for rows, mix in zip(dealt, mixes(labels, dealt), strict=True) if len(rows) <= 100]
    assert max(spans) <= 4  # two shards, each at most over one border


def test_root_verbs_stay_whole_and_volumes_near():
    labels = labels_of({"write": 40, "list": 30, "name": 30, "sort": 12, "give": 8})
    dealt = split(labels, 3, "root_verb", 0)
    assert sorted(len(rows) for rows in dealt) == [38, 40, 42]
    assert sum(len(mix) for mix in mixes(labels, dealt)) == 5
    with pytest.raises(DataError, match="5 root verbs cannot be dealt whole to 6 clients"):
        split(labels, 6, "root_verb", 0)


def test_small_alpha_makes_clients_one_sided():
    labels = labels_of(dict.fromkeys("abcd", 250))
    means = []
    for alpha in (0.1, 1.0, 100.0):
        mixed = [entropy(mix) for seed in range(5) for mix in mixes(labels, split(labels, 8, "dirichlet", seed, alpha=alpha))]
        means.append(sum(mixed) / len(mixed))
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(math.log(4), abs=0.05)


def test_dirichlet_keeps_its_minimum_or_says_that_it_cannot():
    labels = labels_of(dict.fromkeys("abcdefgh", 180))
    assert min(map(len, split(labels, 12, "dirichlet", 0, min_rows=40))) >= 40
    with pytest.raises(DataError, match=r"no draw of 1000 gave each of 12 clients 119 of 1440 rows \(best \d+\)"):
        split(labels, 12, "dirichlet", 0, min_rows=119)


def test_tiny_alpha_deals_every_row():
    labels = labels_of({"a": 40, "b": 40})
    for balance in (False, True):
        dealt = split(labels, 2, "dirichlet", 0, alpha=1e-300, balance=balance)
        assert sorted(row for rows in dealt for row in rows) == list(range(80))


def test_balance_stops_filling_clients_that_have_their_share():
    labels = labels_of(dict.fromkeys("abcdefghij", 20))
    options = {"alpha": 0.2, "balance": True}
    balanced = [max(map(len, split(labels, 5, "dirichlet", seed, **options))) for seed in range(10)]
    free = [max(map(len, split(labels, 5, "dirichlet", seed, alpha=0.2))) for seed in range(10)]
    assert max(balanced) < 40 + 20 <= max(free)  # its even share and one more category


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_shepherds_setting_has_unequal_volumes_none_too_small(seed):
    labels = labels_of(dict(zip("abcdefgh", [1756, 2126, 1763, 699, 2181, 1496, 3732, 1178], strict=True)))
    sizes = sorted(map(len, split(labels, 100, "dirichlet", seed, min_rows=40, balance=True)))
    assert sizes[0] >= 40 and sizes[-1] > 4 * sizes[0]


def test_rows_of_a_test_split_follow_the_training_rows():
    shares = [{"a": 30, "b": 1}, {"a": 10}, {"c": 4}]
    labels = ["a"] * 8 + ["b"] * 3 + ["c"]
    dealt = follow(shares, labels, 0)
    assert mixes(labels, dealt) == [{"a": 6, "b": 3}, {"a": 2}, {"c": 1}]
    assert sorted(row for rows in dealt for row in rows) == list(range(12))
    with pytest.raises(DataError, match="category 'd', which no client has"):
        follow(shares, ["d"], 0)
    assert mixes(["d"] * 45, follow(shares, ["d"] * 45, 0, strangers=True)) == [{"d": 31}, {"d": 10}, {"d": 4}]


@settings(max_examples=40)
@given(labels=st.lists(st.sampled_from("abc"), max_size=60), clients=st.integers(1, 6), seed=st.integers(0, 3))
def test_what_follows_is_dealt_whole_and_only_to_owners(labels, clients, seed):
    train = list("abc" * 20)
    shares = [dict(mix) for mix in mixes(train, split(train, clients, "dirichlet", seed, alpha=1.0, min_rows=0))]
    dealt = follow(shares, labels, seed)
    assert sorted(row for rows in dealt for row in rows) == list(range(len(labels)))
    assert all(set(mix) <= set(share) for mix, share in zip(mixes(labels, dealt), shares, strict=True))


def test_fewer_rows_than_clients():
    for splitter in SPLITTERS:
        with pytest.raises(DataError, match="there are 3 rows for 4 clients"):
            split(["a", "b", "c"], 4, splitter, 0)


def oracle(kind, labels, clients, **options):
    """The parts that flwr-datasets makes of the same labels."""
    partitioner = pytest.importorskip("flwr_datasets.partitioner", reason="no oracle: pip install flwr-datasets")
    import datasets

    made = getattr(partitioner, kind)(**options)
    made.dataset = datasets.Dataset.from_dict({"row": list(range(len(labels))), "label": labels})
    return [sorted(made.load_partition(client)["row"]) for client in range(clients)]


UNEVEN = {"a": 200, "b": 120, "c": 80}


def test_oracle_iid_and_natural_ids():
    labels = labels_of(UNEVEN)
    theirs = oracle("IidPartitioner", labels, 7, num_partitions=7)
    assert sorted(map(len, split(labels, 7, "iid", 0))) == sorted(map(len, theirs))
    theirs = oracle("NaturalIdPartitioner", labels, 3, partition_by="label")
    assert sorted(split(labels, 3, "meta", 0)) == sorted(theirs)


def test_oracle_shards_have_the_same_volumes_and_as_many_categories():
    labels = labels_of(UNEVEN)
    theirs = oracle("ShardPartitioner", labels, 10, num_partitions=10, partition_by="label", num_shards_per_partition=2, seed=1)
    ours = split(labels, 10, "shards", 1, shards=2)
    assert sorted(map(len, ours)) == sorted(map(len, theirs)) == [40] * 10
    assert max(map(len, mixes(labels, ours))) <= 3 and max(map(len, mixes(labels, theirs))) <= 3


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
def test_oracle_dirichlet_is_as_one_sided(alpha):
    labels, means = labels_of(dict.fromkeys("abcd", 250)), []
    for seed in range(12):
        options = {"num_partitions": 8, "partition_by": "label", "alpha": alpha, "min_partition_size": 1, "seed": seed}
        theirs = oracle("DirichletPartitioner", labels, 8, self_balancing=False, **options)
        ours = split(labels, 8, "dirichlet", seed, alpha=alpha)
        means.append([sum(map(entropy, mixes(labels, parts))) / 8 for parts in (ours, theirs)])
    ours, theirs = (sum(column) / len(means) for column in zip(*means, strict=True))
    assert ours == pytest.approx(theirs, abs=0.12)
