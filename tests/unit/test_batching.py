"""Batches: a permutation per epoch from the seed alone, right padding, and masks that do not look at pad ids."""

from itertools import islice

import pytest
import torch

from fedmpi.data.batching import ByLength, batches, collate
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.errors import DataError

PAD = 2  # also the end of every response


def examples(num):
    return [Example([5, 6, *range(10, 10 + i), PAD], [IGNORED, IGNORED, *range(10, 10 + i), PAD], f"r{i}") for i in range(num)]


def test_pads_to_the_longest_on_the_right_with_masks_from_lengths():
    batch = collate([examples(3)[0], examples(3)[2]], PAD)
    assert batch.input_ids.tolist() == [[5, 6, 2, 2, 2], [5, 6, 10, 11, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 2, -100, -100], [-100, -100, 10, 11, 2]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert (batch.ids, batch.num_supervised, batch.num_tokens) == (("r0", "r2"), 4, 8)


def test_a_supervised_first_token_does_not_count():
    batch = collate([Example([7, 8], [7, 8], "r")], 0)
    assert batch.num_supervised == 1


@pytest.mark.parametrize("size", [1, 3, 4, 10, 99])
def test_each_epoch_is_a_permutation_and_keeps_its_last_short_batch(size):
    data, per_epoch = examples(10), -(-10 // size)
    stream = batches(data, size, 0, PAD)
    epochs = [[name for batch in islice(stream, per_epoch) for name in batch.ids] for _ in range(3)]
    assert all(sorted(epoch) == sorted(example.id for example in data) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_alone():
    data = examples(10)
    first = [batch.ids for batch in islice(batches(data, 4, 7, PAD), 9)]
    torch.manual_seed(99)
    assert [batch.ids for batch in islice(batches(data, 4, 7, PAD), 9)] == first
    assert [batch.ids for batch in islice(batches(data, 4, 8, PAD), 9)] != first


@pytest.mark.parametrize("size", [1, 4, 7])
def test_groups_of_like_length_are_a_permutation_with_less_padding(size):
    data = examples(300)
    plain, grouped = batches(data, size, 0, PAD), batches(ByLength(data), size, 0, PAD)
    per_epoch = -(-300 // size)
    padding = []
    for stream in (plain, grouped):
        epoch = list(islice(stream, per_epoch))
        assert sorted(name for batch in epoch for name in batch.ids) == sorted(example.id for example in data)
        assert sorted(len(batch.ids) for batch in epoch)[1:] == [size] * (per_epoch - 1)
        padding.append(sum(batch.input_ids.numel() - batch.num_tokens for batch in epoch))
    assert padding[1] < padding[0] / 3 or size == 1
    second = list(islice(grouped, per_epoch))
    assert [batch.ids for batch in second] != [batch.ids for batch in epoch]
    lengths = [batch.input_ids.shape[1] for batch in second]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_groups_depend_on_the_seed_alone():
    data = ByLength(examples(50))
    first = [batch.ids for batch in islice(batches(data, 4, 7, PAD), 20)]
    assert [batch.ids for batch in islice(batches(data, 4, 7, PAD), 20)] == first
    assert [batch.ids for batch in islice(batches(data, 4, 8, PAD), 20)] != first


def test_no_examples_is_said_at_once():
    with pytest.raises(DataError, match="no example"):
        batches([], 4, 0, PAD)
