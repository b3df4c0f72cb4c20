"""Each metric against numbers worked out by hand, and against other people's programs.

What these gave for predictions.jsonl stands in that file: rouge-score 0.1.2 (without stemming), nltk 3.10.4 (F of sets of words),
scikit-learn 1.9.1 (NDCG, and the precision of a ranking with one relevant result, which is its reciprocal rank), and SQuAD's normal
form as lm-eval 0.4 has it. Where they are installed (pip install 'fedmpi[eval]') they are asked again.
"""

import json
import math
from itertools import permutations
from pathlib import Path

import numpy
import pytest

from fedmpi.evaluation.metrics import OF_RANKS, OF_TEXT, best, exact, f1, ndcg, normal, quasi_exact, reciprocal_rank, rouge2

PREDICTIONS = [json.loads(line) for line in Path(__file__).with_name("predictions.jsonl").read_text("utf-8").splitlines()]


def ours(case: dict) -> dict[str, float]:
    if "relevant" in case:
        return {name: metric(case["relevant"]) for name, metric in OF_RANKS.items()}
    return {name: OF_TEXT[name](case["gold"], case["said"]) for name in case["scores"]}


def theirs(case: dict) -> dict[str, float]:
    reason = "rouge-score, nltk and scikit-learn come with pip install 'fedmpi[eval]'"
    rouge, nltk = (pytest.importorskip(name, reason=reason) for name in ("rouge_score.rouge_scorer", "nltk.metrics.scores"))
    ranking = pytest.importorskip("sklearn.metrics", reason=reason)
    form = pytest.importorskip("lm_eval.tasks.qasper.metrics", reason=reason).normalize_answer
    if "relevant" in case:
        gains = numpy.array([case["relevant"]], dtype=float)
        order = numpy.arange(gains.size, 0, -1.0)[None]
        first = ((gains > 0).cumsum(1) == 1) & (gains > 0) & (numpy.arange(gains.size) < 10)
        rank = ranking.label_ranking_average_precision_score(first, order) if first.any() else 0.0
        return {"rr@10": rank, "ndcg@10": ranking.ndcg_score(gains, order, k=10)}
    gold, said = form(case["gold"]), form(case["said"])
    pairs = rouge.RougeScorer(["rouge2"], use_stemmer=False).score(case["gold"], case["said"])["rouge2"].fmeasure
    return {
        **{"quasi_exact_match": float(gold == said), "f1": nltk.f_measure(set(gold.split()), set(said.split())) or 0.0},
        "rouge2": pairs,
    }


def test_predictions_have_the_scores_that_others_gave_them():
    assert {name for case in PREDICTIONS for name in case["scores"]} == {*OF_TEXT, *OF_RANKS} - {"exact_match"}
    for case in PREDICTIONS:
        assert ours(case) == pytest.approx(case["scores"], abs=1e-9), case


def test_others_still_give_them():
    for case in PREDICTIONS:
        assert theirs(case) == pytest.approx(case["scores"], abs=1e-9), case


def test_normal_form():
    assert normal("  The  U.S. president, a man -- an IDEA ") == "us president man idea"


@pytest.mark.parametrize(
    ("metric", "gold", "said", "score"),
    [
        (exact, "Paris", " Paris\n", 1),
        (exact, "Paris", "paris", 0),
        (quasi_exact, "the Eiffel Tower", "Eiffel tower.", 1),
        (quasi_exact, "Yes", "yes it is", 0),
        (f1, "14 December 1972", "December 1972", 2 * 2 / (3 + 2)),
        (f1, "the cat sat", "a cat, a cat!", 2 * 1 / (2 + 1)),
        (f1, "yes", "no", 0),
        (f1, "the", "a", 1),
        (rouge2, "the cat sat on the mat", "the cat lay on the mat", 2 * 3 / (5 + 5)),
        (rouge2, "a b a b", "a b", 2 * 1 / (3 + 1)),
        (rouge2, "one", "one", 0),
    ],
)
def test_texts(metric, gold, said, score):
    assert metric(gold, said) == pytest.approx(score)


def test_the_gold_that_fits_best_counts():
    assert best(f1, ["14 December 1972 UTC", "December 1972"], "in December 1972") == pytest.approx(4 / 5)


def test_reciprocal_rank():
    assert reciprocal_rank([0, 0, 1, 1]) == 1 / 3
    assert reciprocal_rank([0] * 10 + [1]) == 0 == reciprocal_rank([])


def test_ndcg_by_hand():
    """Gains 3, 0, 2 where 3, 2, 0 were best."""
    assert ndcg([3, 0, 2]) == pytest.approx((3 + 2 / math.log2(4)) / (3 + 2 / math.log2(3)))
    assert ndcg([0, 0]) == 0


def test_ndcg_is_one_for_the_best_order_only():
    gains = (3.0, 1.0, 0.0, 2.0)
    found = {order: ndcg(order) for order in permutations(gains)}
    assert found[(3.0, 2.0, 1.0, 0.0)] == 1 and sum(value == 1 for value in found.values()) == 1
    assert min(found, key=found.__getitem__) == (0.0, 1.0, 2.0, 3.0)


def test_ndcg_knows_what_lies_beyond_the_cut():
    assert ndcg([0.0] * 10 + [1.0]) == 0 and ndcg([1.0] + [0.0] * 20) == 1
