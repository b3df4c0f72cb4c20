"""Worked examples before a question: which are drawn, and how many of them a model can read. It never knows a task or a file."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy

from fedmpi.evaluation.decoding import Speaker
from fedmpi.seeding import seed_for


def choose(labels: Sequence[str], num: int, seed: int, what: str) -> list[int]:
    """Which of a pool become examples: one of each label in turn, the most frequent label first, as HELM does."""
    order = numpy.random.default_rng(seed_for(seed, "shots", what)).permutation(len(labels)).tolist()
    common, turn, turns = Counter(labels), Counter[str](), {}
    for index in order:
        turns[index] = turn[labels[index]]
        turn[labels[index]] += 1
    return sorted(order, key=lambda index: (turns[index], -common[labels[index]]))[:num]


def fitting(
    speaker: Speaker, wanted: Sequence[int], rooms: Sequence[int], prompts: Callable[[int, int], Sequence[str]]
) -> list[int]:
    """For each question with how many whole examples its prompts fit its room; -1 where it does not fit by itself.

    `prompts(question, num)` are the texts of a question after the first `num` of its wanted examples.
    """
    kept = [-1] * len(wanted)
    for num in range(max(wanted, default=0), -1, -1):
        tried = [index for index in range(len(wanted)) if kept[index] < 0 and num <= wanted[index]]
        texts = [prompts(index, num) for index in tried]
        lengths = iter(speaker.lengths([text for several in texts for text in several]))
        for index, several in zip(tried, texts, strict=True):
            if max([next(lengths) for _ in several]) <= rooms[index]:
                kept[index] = num
    return kept
