"""builtin:toy is fixed, its two sides are apart, and every answer is right by another way of solving it."""

import hashlib
import itertools
import json
import re
from collections import Counter

import pytest

from fedmpi.data import toy
from fedmpi.errors import DataError

ANTONYMS = (
    "hot-cold big-small up-down old-new wet-dry day-night fast-slow open-shut high-low rich-poor hard-soft left-right "
    "long-short full-empty good-bad early-late in-out loud-quiet light-dark thick-thin"
)


def solve(category: str, question: str, data: str) -> str:
    """Read the words of a row and answer them, knowing nothing of how the row was made."""
    numbers = [int(text) for text in re.findall(r"\d+", data)]
    if category == "arithmetic":
        return str(sum(numbers) if "gets" in data else numbers[0] - numbers[1])
    if category == "reverse":
        return " ".join(data.split()[::-1])
    if category == "sort":
        return " ".join(map(str, sorted(numbers)))
    if category == "lookup":
        pairs = dict(entry.split(": ") for entry in data.split(", "))
        return next(value for name, value in pairs.items() if re.search(rf"\b{name}\b", question))
    if category == "largest":
        return str(sorted(numbers)[-1])
    if category == "count":
        counts = Counter(data.split())
        return next(str(num) for word, num in counts.items() if re.search(rf"\b{word}\b", question))
    if category == "sequence":
        steps = {after - before for before, after in itertools.pairwise(numbers)}
        return str(numbers[-1] + steps.pop()) if len(steps) == 1 else "no sequence"
    return " ".join(re.search(rf"\b(?:{word}-(\w+)|(\w+)-{word})\b", ANTONYMS).expand(r"\1\2") for word in data.split())


def question_and_data(row: dict[str, str]) -> tuple[str, str]:
    if row["input"]:
        return row["instruction"], row["input"]
    question, data = row["instruction"].split(": ", 1)
    return question, data


@pytest.mark.parametrize("category", toy.CATEGORIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_right(category: str, split: str) -> None:
    rows = [row for row in toy.rows(1600, 3, split) if row["category"] == category]
    assert len(rows) == 200
    wrong = [row for row in rows if solve(category, *question_and_data(row)) != row["output"]]
    assert not wrong, wrong[:3]


def test_rows_are_the_same_on_every_machine() -> None:
    text = json.dumps([toy.rows(256, 0, "train"), toy.rows(256, 0, "test")])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "6f0d3e3aadaf7b95"


def test_a_longer_request_appends_and_another_seed_differs() -> None:
    assert toy.rows(500, 0)[:100] == toy.rows(100, 0)
    assert toy.rows(100, 1) != toy.rows(100, 0)


def test_rows_are_distinct_and_the_sides_are_apart_whatever_the_seeds() -> None:
    train, test = toy.rows(4096, 0), toy.rows(1024, 7, "test")
    asked = [{(row["instruction"], row["input"]) for row in rows} for rows in (train, test)]
    assert [len(pairs) for pairs in asked] == [4096, 1024]
    assert not asked[0] & asked[1]
    # also not as the same problem in other words
    problems = [{(row["category"], question_and_data(row)[1], row["output"]) for row in rows} for rows in (train, test)]
    asked_of = ("lookup", "count")  # one list may stand on both sides with another name asked for, and by chance agree
    assert not {found for found in problems[0] & problems[1] if found[0] not in asked_of}


def test_categories_take_turns_and_answers_are_short() -> None:
    rows = toy.rows(800, 0)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(toy.CATEGORIES, 100)
    assert max(len(row["output"].split()) for row in rows) <= 5
    assert 0.1 < sum(not row["input"] for row in rows) / len(rows) < 0.3


def test_one_answer_for_all_is_a_bad_answer() -> None:
    rows = toy.rows(8000, 0)
    for category in toy.CATEGORIES:
        answers = Counter(row["output"] for row in rows if row["category"] == category)
        assert answers.most_common(1)[0][1] <= 0.25 * answers.total(), category


def test_too_many_rows_and_an_unknown_split_are_errors() -> None:
    with pytest.raises(DataError, match="ask for fewer rows"):
        toy.rows(40_000, 0, "test")
    with pytest.raises(DataError, match="'valid'"):
        toy.rows(1, 0, "valid")


def test_plain_text_holds_no_question_and_no_test_problem() -> None:
    documents = list(itertools.islice(toy.pretraining_text(0, "<{}|{}>".format), 10_000))
    questions = {question_and_data(row)[0] for row in toy.rows(800, 0)}
    held_out = {row["input"] for row in toy.rows(6400, 0, "test") if row["category"] == "sequence"}
    read_of = set[str]()
    for read, ends in documents:
        assert bool(ends) == read.startswith("<")
        text = read.translate(dict.fromkeys(map(ord, toy.MARKS)))
        assert not questions & set(re.split(r"[<|>]", text))
        read_of |= set(re.findall(r"(?m)^(?:After )?([\d ]+) (?:is|and then) \d+\.$", text))
    assert len(read_of) > 100  # so that the next line means something
    assert not read_of & held_out
