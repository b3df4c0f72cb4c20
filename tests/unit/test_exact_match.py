"""Exact match: batched, left-padded answers are those of one row at a time, and are cut and compared as promised."""

from dataclasses import dataclass

import pytest
import torch
from small_models import llama

from fedmpi.data.prompts import render
from fedmpi.evaluation import exact_match


@dataclass(frozen=True)
class Row:
    instruction: str
    input: str
    output: str
    category: str
    id: str = ""


class Letters:
    """A tokenizer of one token per character."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __call__(self, texts, **_):
        return {"input_ids": [[3 + ord(letter) % 97 for letter in text] for text in texts]}

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(chr(256 + token) if token > 2 else "" for token in row) for row in rows]


ROWS = [Row("Add one" * (1 + index), "to " * (index % 3), "x", "ab"[index % 2]) for index in range(5)]


def one_by_one(model, row, num_tokens):
    """Greedy decoding written out: no cache, no padding."""
    ids = [1, *Letters()([render(row.instruction, row.input)])["input_ids"][0]]
    answer = []
    for _ in range(num_tokens):
        answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        if answer[-1] == 2:
            break
    return Letters().batch_decode([[token for token in answer if token != 2]], True)[0]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_are_those_of_greedy_decoding_row_by_row(batch_size):
    model = llama(vocab=100, spread=0.5)
    score = exact_match(model, Letters(), ROWS, max_new_tokens=7, batch_size=batch_size)
    assert list(score.outputs) == [one_by_one(model, row, 7) for row in ROWS]
    assert len(set(score.outputs)) > 1


def test_scores_by_category():
    model = llama(vocab=100, spread=0.5)
    outputs = exact_match(model, Letters(), ROWS, max_new_tokens=4).outputs
    wanted = [f" {outputs[0]}\n", outputs[1], *(text + "no" for text in outputs[2:])]
    rows = [Row(row.instruction, row.input, text, row.category) for row, text in zip(ROWS, wanted, strict=True)]
    score = exact_match(model, Letters(), rows, max_new_tokens=4)
    assert (score.exact, score.num) == (2 / 5, 5)
    assert score.by_category == {"a": (1 / 3, 3), "b": (1 / 2, 2)}


def test_an_answer_ends_at_the_end_token():
    """The third letter of an answer is declared the end token; the other row of the batch goes on for all five."""
    model, rows = llama(vocab=100, spread=0.5), ROWS[:2]
    whole = exact_match(model, Letters(), rows, max_new_tokens=5).outputs
    ending = Letters()
    ending.eos_token_id = ord(whole[0][2]) - 256
    cut = exact_match(model, ending, rows, max_new_tokens=5).outputs
    assert len(whole[0]) == 5
    assert list(cut) == [text.split(whole[0][2])[0] for text in whole] and len(cut[0]) <= 2


def test_an_answer_is_followed_no_further_than_it_could_become_right():
    """The limit is a row's own, so that the rows beside it in a batch do not matter."""
    rows = [Row("Add", "", "", "a"), Row("Add two", "", "xy" * 6, "a")]
    model = llama(vocab=100, spread=0.5)
    together = exact_match(model, Letters(), rows, max_new_tokens=64)
    assert list(map(len, together.outputs)) == [8, 12 + 8]
    assert together.outputs == exact_match(model, Letters(), rows, max_new_tokens=64, batch_size=1).outputs


def test_the_mode_comes_back():
    model = llama(vocab=100, spread=0.5).train()
    exact_match(model, Letters(), ROWS[:2], max_new_tokens=1)
    assert model.training


def test_no_rows_give_no_score():
    score = exact_match(llama(), Letters(), [])
    assert (score.exact, score.num, score.by_category, score.outputs) == (0.0, 0, {}, ())
