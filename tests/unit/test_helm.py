"""HELM: the table is the paper's, questions are read from real files, oracles bound the pipeline, misfits are left out and said."""

import json
from pathlib import Path

import pytest
from evaluation_data import Oracle, shared

from fedmpi.data import files
from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation import helm
from fedmpi.evaluation.decoding import Measure
from fedmpi.evaluation.helm_table import SUBTASKS, SUITES
from fedmpi.evaluation.shots import choose
from fedmpi.evaluation.task import Options
from fedmpi.result import Result, show

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
    found = Result(tmp_path / "out", suite, {}, task).make(Knowing(task, right), 7)
    assert found["num_subtasks"] == len(SUITES[suite]) and found["left_out"] == {}
    scores = {name: subtask["score"] for name, subtask in found["subtasks"].items()}
    if right:
        assert set(scores.values()) == {1.0} and found["score"] == 1.0
    else:
        assert {name for name, score in scores.items() if score} <= {"msmarco_trec"}, (
            "a full list of twelve still has gains in its ten"
        )
        assert scores.get("msmarco_trec", 0) < 0.8


def test_what_does_not_fit_is_left_out_of_the_mean_and_named(folder, tmp_path, capsys):
    task = helm.build(Options("helm-mini", data=str(folder)), "helm-mini", "")
    longest = {item.subtask: len(item.question.prompts[0]) for item in task.items}
    oracle = Knowing(task, context=longest["natural_qa_open"] + 99)
    found = Result(tmp_path / "out", "helm-mini", {}, task).make(oracle, 100)
    assert found["left_out"] == {"natural_qa_open": "4 of 4 inputs do not fit the model's context"}
    assert found["num_subtasks"] == 3 and found["score"] == 1.0
    show(found, tmp_path)
    told = capsys.readouterr().out
    assert "left out of the mean: natural_qa_open, 4 of 4 inputs" in told and "imdb: 1.0000 (accuracy, 4 questions" in told


def test_a_subtask_without_data_says_what_it_needs(folder, tmp_path):
    (folder / "natural_qa_open.jsonl").unlink()
    task = helm.build(Options("helm-mini", data=str(folder)), "helm-mini", "")
    needs = "needs --data: natural_qa_open.jsonl, whose records have question, passage, answer"
    assert task.left_out == {"natural_qa_open": needs}, "a result tells it, and no folder of this machine"
    with pytest.raises(DataError, match="finds no data.*natural_qa_open.jsonl"):
        helm.build(Options("helm:natural_qa_open", data=str(folder)), "helm", "natural_qa_open")
    with pytest.raises(ConfigError, match="helm-mini has mmlu"):
        helm.build(Options("helm-mini:quac", data=str(folder)), "helm-mini", "quac")


def test_a_file_that_is_there_and_broken_is_not_left_out(folder):
    (folder / "imdb_test.jsonl").write_text('{"text": "a film", "label": \n')
    with pytest.raises(DataError, match="imdb_test.jsonl line 1 is not JSON"):
        helm.build(Options("helm-mini", data=str(folder)), "helm-mini", "")


def test_worked_examples_are_one_of_each_answer_in_turn():
    labels = ["A"] * 6 + ["B"] * 3 + ["C"]
    chosen = choose(labels, 5, 0, "x")
    assert [labels[index] for index in chosen] == ["A", "B", "C", "A", "B"] and len(set(chosen)) == 5
    assert choose(labels, 5, 0, "x") == chosen != choose(labels, 5, 1, "x") and sorted(choose(labels, 99, 0, "x")) == [*range(10)]


def imdb(folder, train: int | None = None, **options) -> helm.Helm:
    """IMDB with six reviews to ask, and perhaps a file of others."""
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    write("imdb_test.jsonl", [{"text": f"film {n}", "label": "neg"} for n in range(6)])
    if train is not None:
        write("imdb_train.jsonl", [{"text": f"old {n}", "label": ("pos", "neg")[n % 2]} for n in range(train)])
    return helm.build(Options("helm:imdb", data=str(folder), **options), "helm", "imdb")


def test_worked_examples_are_of_the_training_file_and_the_same_for_all(tmp_path):
    task = imdb(tmp_path, train=9)
    prompts = [item.prompts() for item in task.items]
    parts = [prompt.split("\n\n") for (prompt,) in prompts]
    assert all(part[:5] == parts[0][:5] for part in parts) and parts[0][5] == "Passage: film 0\nSentiment:"
    answers = [part.rpartition(" ")[2] for part in parts[0][:5]]
    assert answers == ["Positive", "Negative", "Positive", "Negative", "Positive"] and "Passage: old" in parts[0][0]
    assert task.facts()["shots"] == {"imdb": 5} and task.facts()["shots_from"] == {"imdb": "imdb_train.jsonl"}
    assert imdb(tmp_path, seed=1).items[0].prompts() != prompts[0] == imdb(tmp_path).items[0].prompts()
    assert imdb(tmp_path, shots="0").items[0].prompts() == ["Passage: film 0\nSentiment:"]
    with pytest.raises(ConfigError, match="--shots is 'cot.txt': --task helm:imdb draws its examples itself, give their number"):
        imdb(tmp_path, shots="cot.txt")


def test_without_a_training_file_no_row_is_both_asked_and_shown(tmp_path):
    task = imdb(tmp_path, rows=2)
    asked, shown = ({item.id.partition("/")[2] for item in task.items}, task.items[0].shots)
    assert len(asked) == 2 and len(shown) == 4 and not any(f"film {number}\n" in shot for number in asked for shot in shown)
    assert task.facts()["shots_from"] == {"imdb": "rows that are not asked"}
    assert imdb(tmp_path).facts()["shots"] == {"imdb": 0}, "all are asked"


def test_worked_examples_that_do_not_fit_are_dropped_whole_and_counted(tmp_path):
    task = imdb(tmp_path, train=9)
    room = len(task.items[0].prompts(3)[0]) + SUBTASKS["imdb"].max_new_tokens
    found = Result(tmp_path / "out", "helm", {}, task).make(Knowing(task, context=room), 4)
    assert {record["shots"] for record in found["records"]} == {3} and found["score"] == 1.0
    assert found["shots_dropped"] == found["subtasks"]["imdb"]["shots_dropped"] == 6 * 2


def test_ranking_shows_relevant_and_other_passages(folder):
    passages = [{"text": f"old {n}", "relevance": n % 2} for n in range(6)]
    (folder / "msmarco_trec_train.jsonl").write_text(json.dumps({"query": "why", "passages": passages}) + "\n")
    item = helm.build(Options("helm:msmarco_trec", data=str(folder)), "helm", "msmarco_trec").items[0]
    assert [shot.rpartition(" ")[2] for shot in item.shots] in (["Yes", "No"] * 2, ["No", "Yes"] * 2)
    assert len(item.prompts()) == 12 and all(prompt.startswith(item.shots[0]) for prompt in item.prompts())


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
    again, other = (helm.build(Options("helm:imdb", data=str(folder), seed=seed), "helm", "imdb") for seed in (0, 1))
    assert list(again.ids) == asked["imdb"] != list(other.ids) and len(other.ids) == 100
    shots = task.facts()["shots"]
    assert {name for name in shots if shots[name] != 5} == {"narrative_qa"}, "all of its 50 rows are asked"
    dev, source = files.read(folder / "mmlu_dev.jsonl.gz")[0], task.shots_from["mmlu"]
    mmlu = next(item for item in task.items if item.subtask == "mmlu")
    same = [row.values["question"].strip() for row in dev if row.values["subject"].replace("_", " ") == mmlu.question.group]
    assert (
        source == "mmlu_dev.jsonl.gz" and len(same) == 5 and all(any(question in shot for shot in mmlu.shots) for question in same)
    )
    found = Result(tmp_path, "helm", {}, task).make(Knowing(task), 10**6)
    assert found["score"] == 1.0 and found["num_subtasks"] == len(ready)
