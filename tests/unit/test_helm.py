"""HELM: the table is the paper's, questions are read from real files, oracles bound the pipeline, misfits are left out and said."""

import json
from pathlib import Path

import pytest
from evaluation_data import Oracle, shared

from fedmpi import evaluate
from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation import helm
from fedmpi.evaluation.decoding import Measure
from fedmpi.evaluation.helm_table import SUBTASKS, SUITES
from fedmpi.evaluation.task import Options

FIXTURES = {
    "mmlu_test": {"question": "2 + 2?", "subject": "x", "choices": ["3", "4", "5", "6"], "answer": 1},
    "boolq_validation": {"question": "is water wet", "passage": "Water wets.", "answer": True},
    "narrativeqa_test": {"question": "Who came?", "passage": "Ann came.", "answer": ["Ann", "Ann did"]},
    "NQ-open.dev": {"question": "when was it", "answer": ["1972", "in 1972"]},
    "natural_qa_open": {"question": "when was it", "passage": "In 1972 it was.", "answer": ["1972"]},
    "quac_test": {
        "passage": "She married in 1983.",
        "question": "question1: when did she marry?\nquestion2: and then?",
        "answer": "possible answers for question1:\nin 1983,\npossible answers for question2:\nnothing",
    },
    "hellaswag_mc_5shot_docs": {"query": "He opens\n A. up\n B. down\nAnswer:", "choices": ["A", "B"], "gold": 1},
    "openbookqa_test": {"question": "The sun is", "options": "A. cold\nB. hot", "answer": "B. hot"},
    "msmarco_regular": {"query": "what", "passages": [{"text": f"p{n}", "relevance": int(n == 3)} for n in range(12)]},
    "msmarco_trec": {"query": "what", "passages": [{"text": f"p{n}", "relevance": n % 4} for n in range(12)]},
    "cnn_dailymail": {"article": "Much happened.", "highlights": "Something big happened today."},
    "xsum": {"document": "Much happened.", "summary": "Something big happened today."},
    "imdb_test": {"text": "Bad.", "label": "neg"},
    "civil_comments": {"text": "You fool", "toxicity": 0.7},
    "raft": {"text": "I want a refund", "label": "complaint", "labels": ["complaint", "no complaint"]},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Every subtask with four records that differ by a number only."""
    for name, record in FIXTURES.items():
        lines = [json.dumps({**record, "number": number}) for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"Adv,Cat,Why {n}?,Because,x,Never; Always; Perhaps,src" for n in range(4)]
    head = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"
    (tmp_path / "TruthfulQA.csv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path


class Knowing(Oracle):
    """Finds the right choice likeliest and ranks passages by relevance, or the other way round."""

    def __init__(self, task, right=True, context=10**6):
        super().__init__({item.id: item.question.golds[0] for item in task.items if item.question.golds}, right)
        self.questions, self.context = {item.id: item.question for item in task.items}, context

    def lengths(self, prompts):
        return [len(prompt) for prompt in prompts]

    def encode(self, prompt, continuation, name):
        return name

    def measure(self, examples):
        return [Measure(self._loss(*name.split("|")), 1, 0) for name in examples]

    def _loss(self, key, number, choice):
        question = self.questions[key]
        if question.relevant:
            doubt = -question.relevant[int(number)] if choice == "Yes" else 0.0
        else:
            doubt = float(choice not in question.golds)
        return doubt if self.right else -doubt


def test_the_table_is_the_papers():
    """FS-LLM appendix A.2: eight by accuracy, four by F1, two by ROUGE-2, one by RR@10, one by NDCG@10."""
    metrics = [subtask.metric for subtask in SUBTASKS.values()]
    assert {metric: metrics.count(metric) for metric in metrics} == {"accuracy": 8, "f1": 4, "rouge2": 2, "rr@10": 1, "ndcg@10": 1}
    assert len(SUITES["helm"]) == 16 and len(SUITES["helm-mini"]) == 4 and len(SUITES["helm-qa"]) == 8


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("right", [True, False])
def test_an_oracle_scores_one_and_its_opposite_nothing(suite, right, folder, tmp_path):
    task = helm.build(Options(suite, data=str(folder)), suite, "")
    found = evaluate.Result(tmp_path / "out", suite, {}, task).make(Knowing(task, right), 7)
    assert found["num_subtasks"] == len(SUITES[suite]) and found["left_out"] == {}
    scores = {name: subtask["score"] for name, subtask in found["subtasks"].items()}
    if right:
        assert set(scores.values()) == {1.0} and found["score"] == 1.0
    else:
        assert {name for name, score in scores.items() if score} <= {"msmarco_trec"}, (
            "a full list of twelve still has gains in its ten"
        )
        assert scores.get("msmarco_trec", 0) < 0.8


def test_what_does_not_fit_is_left_out_of_the_mean_and_named(folder, tmp_path):
    task = helm.build(Options("helm-mini", data=str(folder)), "helm-mini", "")
    longest = {item.subtask: len(item.question.prompts[0]) for item in task.items}
    oracle = Knowing(task, context=longest["natural_qa_open"] + 99)
    found = evaluate.Result(tmp_path / "out", "helm-mini", {}, task).make(oracle, 100)
    assert found["left_out"] == {"natural_qa_open": "4 of 4 inputs do not fit the model's context"}
    assert found["num_subtasks"] == 3 and found["score"] == 1.0


def test_a_subtask_without_data_says_what_it_needs(folder, tmp_path):
    (folder / "natural_qa_open.jsonl").unlink()
    task = helm.build(Options("helm-mini", data=str(folder)), "helm-mini", "")
    assert (
        "natural_qa_open.jsonl" in task.left_out["natural_qa_open"]
        and "question, passage, answer" in task.left_out["natural_qa_open"]
    )
    with pytest.raises(DataError, match="finds no data.*natural_qa_open.jsonl"):
        helm.build(Options("helm:natural_qa_open", data=str(folder)), "helm", "natural_qa_open")
    with pytest.raises(ConfigError, match="helm-mini has mmlu"):
        helm.build(Options("helm-mini:quac", data=str(folder)), "helm-mini", "quac")


def test_a_record_of_another_kind_is_told_by_its_line(folder):
    (folder / "xsum.jsonl").write_text('{"document": "a", "summary": "b"}\n{"document": "a"}\n')
    with pytest.raises(DataError, match="xsum.jsonl line 2 is no question of xsum.*expected document, summary"):
        helm.build(Options("helm:xsum", data=str(folder)), "helm", "xsum")


def test_the_first_question_of_a_dialogue_and_its_answers(folder):
    task = helm.build(Options("helm:quac", data=str(folder)), "helm", "quac")
    question = task.items[0].question
    assert "Question: when did she marry?\nAnswer:" in question.prompts[0] and question.golds == ("in 1983",)


def test_real_files_are_drawn_with_a_seed(tmp_path):
    folder = shared("helm")
    task = helm.build(Options("helm", data=str(folder)), "helm", "")
    asked = {name: [item.id for item in task.items if item.subtask == name] for name in SUBTASKS}
    ready = {name for name, ids in asked.items() if ids}
    assert {"mmlu", "boolq", "quac", "hellaswag", "openbookqa", "truthful_qa", "imdb", "natural_qa_closed"} <= ready
    assert len(asked["mmlu"]) == 100 and len(asked["narrative_qa"]) == 50 and set(task.left_out) == set(SUBTASKS) - ready
    assert [item.id for item in helm.build(Options("helm", data=str(folder)), "helm", "").items] == list(task.ids)
    other = helm.build(Options("helm:mmlu", data=str(folder), seed=1), "helm", "mmlu")
    assert len(other.ids) == 100 and set(other.ids) != set(asked["mmlu"])
    found = evaluate.Result(tmp_path, "helm", {}, task).make(Knowing(task), 10**6)
    assert found["score"] == 1.0 and found["num_subtasks"] == len(ready)
