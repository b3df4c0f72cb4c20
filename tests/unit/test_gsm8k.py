"""GSM8K: numbers as numbers, shots whole or not at all, and the whole pipeline between 0 and 1."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from evaluation_data import Oracle, shared

from fedmpi import data
from fedmpi.data.corpora import Row
from fedmpi.errors import DataError
from fedmpi.evaluation import gsm8k
from fedmpi.evaluation.decoding import Decoding
from fedmpi.evaluation.task import Options
from fedmpi.evaluation.tasks import Subject, build
from fedmpi.result import Result

ROWS = [Row(f"What is {n} and {n}?", "", f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}", "", f"q{n}") for n in range(1, 9)]
SHOTS = "".join(f"Q: What is {n} less 1?\nA: One before {n} is {n - 1}. The answer is {n - 1}.\n\n" for n in range(2, 10))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 18.0 left. The answer is 18.0.", "18"),
        ("so 3 + 4 = 7. The answer is 7.\n\nQ: next? The answer is 9", "7"),
        ("She pays $1,200.50 in all", "1200.5"),
        ("#### 42", "42"),
        ("5 * 2 = 10\n#### 10\n#### 11", "10"),
        ("the ANSWER IS: $ 1,450,000!", "1450000"),
        ("the answer is unclear, perhaps 5 or 6", "5"),
        ("the answer is as above: none", None),
        ("10-5 makes 5", "5"),
        ("we get 10-5", "5"),
        ("it fell to -5 degrees", "-5"),
        ("minus: −3", "-3"),
        ("about .5 of it", "0.5"),
        ("3,4 and then 12", "12"),
        ("no number here", None),
        ("", None),
        ("It costs 100.", "100"),
    ],
)
def test_predictions(text, number):
    assert gsm8k.prediction(text) == (None if number is None else Decimal(number))


def test_gold_numbers():
    assert gsm8k.gold("a\n#### 2,125", "q") == 2125 == gsm8k.prediction("so it is 2125.00")
    assert gsm8k.gold("#### -5", "q") == -5
    with pytest.raises(DataError, match="gsm8k test:7: its answer has no number after ####"):
        gsm8k.gold("eighteen", "test:7")


class Reader(Oracle):
    """An oracle that reads so many characters; keeps the prompts it was given."""

    def __init__(self, golds, right=True, context=10**6):
        super().__init__(golds, right)
        self.context, self.prompts = context, []

    def lengths(self, prompts):
        return [len(prompt) for prompt in prompts]

    def say(self, prompts, decoding, keys, limits=()):
        self.prompts += prompts
        return super().say(prompts, decoding, keys)


def task(tmp_path: Path, shots: bool = True, form: str | None = None) -> gsm8k.Gsm8k:
    (tmp_path / "shots.txt").write_text(SHOTS)
    path = str(tmp_path / "shots.txt") if shots else None
    return gsm8k.build(ROWS, path, form, "alpaca", Decoding(max_new_tokens=20))


def test_the_two_forms(tmp_path):
    bare = task(tmp_path).prompt(ROWS[0], 2)
    assert bare == SHOTS.split("\n\nQ: What is 4")[0] + "\n\nQ: What is 1 and 1?\nA:"
    framed = task(tmp_path, form="training").prompt(ROWS[0], 1)
    assert framed.count("### Response:\n") == 2 and framed.endswith(data.render(ROWS[0].instruction, ""))
    assert task(tmp_path, shots=False).prompt(ROWS[0], 0) == data.render(ROWS[0].instruction, "")


@pytest.mark.parametrize("right", [True, False])
def test_an_oracle_scores_one_and_its_opposite_nothing(right, tmp_path):
    oracle = Reader({row.id: row.output for row in ROWS}, right)
    found = Result(tmp_path, "gsm8k", {}, task(tmp_path)).make(oracle, 3)
    assert found["score"] == float(right) and found["shots_dropped"] == 0
    assert found["settings"]["shots"] == 8 and found["answers_without_a_number"] == (0 if right else 8)


def test_shots_that_do_not_fit_are_dropped_whole_and_counted(tmp_path):
    asked = task(tmp_path)
    three = len(asked.prompt(ROWS[0], 3))
    oracle = Reader({row.id: row.output for row in ROWS}, context=three + 20)
    found = Result(tmp_path, "gsm8k", {}, asked).make(oracle, 100)
    assert oracle.prompts == [asked.prompt(row, 3) for row in ROWS]
    assert found["shots_dropped"] == 8 * 5 and found["questions_without_all_shots"] == 8
    assert {record["shots"] for record in found["records"]} == {3}


def test_a_file_of_shots_that_is_none_is_told(tmp_path):
    (tmp_path / "bad.txt").write_text("Q: one\nA: two\n\nQ: three")
    with pytest.raises(DataError, match="example 2 is no pair of Q: and A:"):
        gsm8k.read_shots(str(tmp_path / "bad.txt"))


def test_the_real_test_file_and_the_published_shots():
    folder = shared("gsm8k")
    options = Options("gsm8k", data=str(folder), shots=str(folder / "cot_8shot.txt"))
    found = build(Subject(options, None, data.Config(), None, 0))
    assert len(found.ids) == 1319 and len(found.shots) == 8
    golds = [json.loads(line)["answer"].split("#### ")[1] for line in (folder / "test.jsonl").read_text().splitlines()]
    records = found.ask(Reader({row.id: row.output for row in found.rows}), range(1319))
    assert [Decimal(record["gold"]) for record in records] == [Decimal(gold.replace(",", "")) for gold in golds]
    assert found.score(records)["score"] == 1.0
    for shot in found.shots:
        assert gsm8k.prediction(shot.answer) is not None
    assert found.prompt(found.rows[0], 8).startswith((folder / "cot_8shot.txt").read_text().strip())
