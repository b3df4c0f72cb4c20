"""The 16 HELM subtasks of FS-LLM as one table: metric, files, and how a record becomes a question. It never knows a model."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedmpi.data.records import Record as FileRecord
from fedmpi.errors import DataError
from fedmpi.seeding import seed_for

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """Prompts and what is right: with choices one of these, with `relevant` an order of the prompts, else a text."""

    prompts: tuple[str, ...]
    golds: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    relevant: tuple[float, ...] = ()
    head: str = ""  # what stands before the worked examples
    group: str = ""  # worked examples are of the same group

    def worked(self) -> list[tuple[str, str]]:
        """The question as worked examples, each a prompt and its answer: one, or one for each passage that is ranked."""
        if self.relevant:
            return [(prompt, "Yes" if gain > 0 else "No") for prompt, gain in zip(self.prompts, self.relevant, strict=True)]
        return [(self.prompts[0], self.golds[0])]


@dataclass(frozen=True)
class Subtask:
    """A row of the table. `answer_metric` is FedBiOT's, of a generated answer, for its eight question-answering tasks.

    Worked examples are of the file NAME_train.jsonl or of those named in `train`, else of the rows that are not asked.
    """

    metric: str  # accuracy, f1, rouge2, rr@10, ndcg@10
    files: tuple[str, ...]
    fields: str  # what a record must have, in words for the user
    ask: Callable[[Mapping[str, Any]], Question]
    answer_metric: str = ""
    max_new_tokens: int = 5
    train: tuple[str, ...] = ()
    shots: int = 5  # worked examples, as many as HELM gives


def _options(question: str, options: list[str], right: int) -> Question:
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    letters = tuple(LETTERS[: len(options)])
    return Question((f"Question: {question.strip()}{lines}\nAnswer:",), (letters[right],), letters)


def _mmlu(row: Mapping[str, Any]) -> Question:
    about = str(row["subject"]).replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}."
    return replace(_options(row["question"], list(row["choices"]), int(row["answer"])), head=head, group=about)


def _openbookqa(row: Mapping[str, Any]) -> Question:
    if "query" in row:
        return _joint({**row, "query": str(row["query"]).replace("\n ", "\n")})
    if "question_stem" in row:
        labels = list(row["choices"]["label"])
        return _options(row["question_stem"], list(row["choices"]["text"]), labels.index(row["answerKey"]))
    options = [line.partition(". ")[2] for line in row["options"].strip().splitlines()]
    return _options(row["question"], options, LETTERS.index(row["answer"].strip()[0]))


def _joint(row: Mapping[str, Any]) -> Question:
    """Question and options are one text already."""
    choices = tuple(row["choices"])
    return Question((row["query"],), (choices[int(row["gold"])],), choices)


def _truthful(row: Mapping[str, Any]) -> Question:
    """The best answer among the wrong ones, in an order that the question fixes."""
    right = str(row["Best Answer"]).strip()
    options = [right, *(wrong.strip() for wrong in str(row["Incorrect Answers"]).split(";") if wrong.strip())][: len(LETTERS)]
    random.Random(seed_for(0, "truthful_qa", str(row["Question"]))).shuffle(options)
    return _options(str(row["Question"]), options, options.index(right))


def _boolq(row: Mapping[str, Any]) -> Question:
    gold = "Yes" if str(row["answer"]).lower() in ("true", "yes", "1") else "No"
    return Question((f"{row['passage']}\nQuestion: {str(row['question']).rstrip('?')}?\nAnswer:",), (gold,), ("Yes", "No"))


def _imdb(row: Mapping[str, Any]) -> Question:
    gold = "Positive" if str(row["label"]).lower() in ("pos", "positive", "1") else "Negative"
    return Question((f"Passage: {row['text']}\nSentiment:",), (gold,), ("Positive", "Negative"))


def _toxic(row: Mapping[str, Any]) -> Question:
    gold = "True" if float(row["toxicity"]) >= 0.5 else "False"
    return Question((f"Passage: {row['text']}\nQuestion: Is the passage above toxic?\nAnswer:",), (gold,), ("True", "False"))


def _raft(row: Mapping[str, Any]) -> Question:
    return Question((f"{row['text']}\nLabel:",), (row["label"],), tuple(row["labels"]), group=" | ".join(row["labels"]))


def _closed(row: Mapping[str, Any]) -> Question:
    return Question((f"Question: {str(row['question']).rstrip('?')}?\nAnswer:",), _golds(row["answer"]))


def _open(row: Mapping[str, Any]) -> Question:
    return Question((f"Passage: {row['passage']}\nQuestion: {str(row['question']).rstrip('?')}?\nAnswer:",), _golds(row["answer"]))


def _quac(row: Mapping[str, Any]) -> Question:
    """Where a record holds a dialogue as one text, its first question is asked; all its answers are one gold there."""
    question, answer = str(row["question"]), row["answer"]
    if isinstance(answer, str) and answer.startswith("possible answers for question1:"):
        question = question.split("\n")[0].removeprefix("question1:").strip()
        answer = answer.split("possible answers for question2:")[0].partition(":")[2].strip().strip(",")
    return _open({"passage": row["passage"], "question": question, "answer": answer})


def _summary(source: str, target: str) -> Callable[[Mapping[str, Any]], Question]:
    return lambda row: Question((f"{row[source]}\nSummarize the above article.\nSummary:",), (row[target],))


def _ranked(row: Mapping[str, Any]) -> Question:
    ask = "\nQuery: {}\nPrompt: Does the passage answer the query?\nAnswer:".format
    prompts = tuple(f"Passage: {passage['text']}{ask(row['query'])}" for passage in row["passages"])
    return Question(prompts, choices=("Yes", "No"), relevant=tuple(float(passage["relevance"]) for passage in row["passages"]))


def _golds(answer: Any) -> tuple[str, ...]:
    return tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)


PASSAGES = "query, passages (a list of objects with text and relevance)"
SUBTASKS: Mapping[str, Subtask] = {
    "mmlu": Subtask(
        "accuracy", ("mmlu_test.jsonl",), "question, subject, choices, answer", _mmlu, "exact_match", train=("mmlu_dev.jsonl",)
    ),
    "boolq": Subtask("accuracy", ("boolq_validation.jsonl",), "question, passage, answer", _boolq, "quasi_exact_match"),
    "narrative_qa": Subtask(
        "f1", ("narrativeqa_test.jsonl", "narrativeqa_test-tiny.jsonl"), "question, passage, answer", _open, "f1", 100
    ),
    "natural_qa_closed": Subtask("f1", ("NQ-open.dev.jsonl", "nq-open_test.jsonl"), "question, answer", _closed, "f1", 100),
    "natural_qa_open": Subtask("f1", ("natural_qa_open.jsonl",), "question, passage, answer", _open, "f1", 100),
    "quac": Subtask("f1", ("quac_test.jsonl",), "question, passage, answer", _quac, "f1", 100),
    "hellaswag": Subtask("accuracy", ("hellaswag_mc_5shot_docs.jsonl",), "query, choices, gold", _joint, "exact_match"),
    "openbookqa": Subtask(
        "accuracy",
        ("openbookqa_test.jsonl", "openbookqa_validation.jsonl"),
        "question, options, answer",
        _openbookqa,
        "exact_match",
        train=("openbookqa_train_mc_5shot_docs.jsonl",),
    ),
    "truthful_qa": Subtask("accuracy", ("TruthfulQA.csv",), "Question, Best Answer, Incorrect Answers", _truthful),
    "msmarco_regular": Subtask("rr@10", ("msmarco_regular.jsonl",), PASSAGES, _ranked, shots=4),
    "msmarco_trec": Subtask("ndcg@10", ("msmarco_trec.jsonl",), PASSAGES, _ranked, shots=4),
    "cnn_dailymail": Subtask("rouge2", ("cnn_dailymail.jsonl",), "article, highlights", _summary("article", "highlights"), "", 128),
    "xsum": Subtask("rouge2", ("xsum.jsonl",), "document, summary", _summary("document", "summary"), "", 64),
    "imdb": Subtask("accuracy", ("imdb_test.jsonl", "imdb_test_500.jsonl"), "text, label", _imdb, train=("imdb_train_500.jsonl",)),
    "civil_comments": Subtask("accuracy", ("civil_comments.jsonl",), "text, toxicity", _toxic),
    "raft": Subtask("accuracy", ("raft.jsonl",), "text, label, labels", _raft),
}
SUITES: Mapping[str, tuple[str, ...]] = {
    "helm": tuple(SUBTASKS),
    "helm-mini": ("mmlu", "natural_qa_open", "openbookqa", "imdb"),
    "helm-qa": tuple(name for name, subtask in SUBTASKS.items() if subtask.answer_metric),  # FedBiOT's eight
}


def question(name: str, record: FileRecord) -> Question:
    """A record as a question, or what is wrong with it."""
    try:
        return SUBTASKS[name].ask(record.values)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{record.place} is no question of {name} ({reason}): expected {SUBTASKS[name].fields}") from None
