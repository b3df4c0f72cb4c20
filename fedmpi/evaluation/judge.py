"""Pairwise scores by a judge: a model behind an OpenAI-compatible HTTP address rates two answers to each question.

As in FedIT: scores of 1 to 10, each pair rated three times, the relative score is ours over the other's. Unlike there, every
pair is rated in both orders, since judges favour a place. The key is read from FEDMPI_JUDGE_KEY and never recorded.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmpi.data import Config as DataConfig
from fedmpi.data import render
from fedmpi.errors import ConfigError, DataError, EvaluationError
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.evaluation.intervals import bootstrap
from fedmpi.evaluation.task import Options, Record, draw, open_records, prompt_hash

RATINGS = 3  # in each of the two orders
TRIES = 3
WAIT_S = 120.0
TEMPERATURE = 0.2
KEY = "FEDMPI_JUDGE_KEY"
ROLE = "You compare two assistants. Judge how helpful, relevant, correct and detailed each answer is; their order means nothing."
FORM = (
    "Question:\n{question}\n\nAnswer of assistant 1:\n{first}\n\nAnswer of assistant 2:\n{second}\n\n"
    "Begin with one line that holds two numbers from 1 to 10, the scores of assistant 1 and of assistant 2, and nothing else. "
    "Explain them after that line."
)
SCORES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*[,;\s]\s*(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Asked:
    """A question as users see it, and its name."""

    id: str
    question: str


@dataclass(frozen=True)
class Judge:
    """Who rates: address, model, and how often."""

    url: str
    model: str

    def rate(self, question: str, first: str, second: str, seed: int) -> tuple[float, float] | None:
        """The two scores; None where no reply begins with two numbers from 1 to 10."""
        words = [
            {"role": "system", "content": ROLE},
            {"role": "user", "content": FORM.format(question=question, first=first, second=second)},
        ]
        body = {"model": self.model, "messages": words, "temperature": TEMPERATURE, "max_tokens": 512, "seed": seed}
        for attempt in range(TRIES):
            if found := scores_of(self._reply({**body, "seed": seed + attempt})):
                return found
        return None

    def _reply(self, body: Mapping[str, Any]) -> str:
        head = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            head["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), head)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                lasting, why = error.code < 500 and error.code != 429, f"HTTP {error.code}"
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                lasting, why = False, f"{type(error).__name__}: {error}"
            if lasting or attempt == TRIES - 1:
                break
            time.sleep(2.0**attempt)
        raise EvaluationError(f"the judge at {self.url} gave no reply ({why}): mend it and start again; what it rated is kept")


def scores_of(reply: str) -> tuple[float, float] | None:
    """The two numbers at the beginning."""
    found = SCORES.match(reply)
    pair = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    return pair if all(1 <= score <= 10 for score in pair) else None


@dataclass(frozen=True)
class Answers:
    """Answers to questions, unscored: what a judge compares later, or a person reads."""

    asked: Sequence[Asked]
    template: str
    decoding: Decoding
    tokenizer: Any = None
    name: str = "answers"

    @property
    def ids(self) -> Sequence[str]:
        """The questions."""
        return [asked.id for asked in self.asked]

    def facts(self) -> Mapping[str, Any]:
        """As every task."""
        prompts = [self._prompt(asked) for asked in self.asked]
        return {"prompt_hash": prompt_hash(prompts), "shots": 0, "decoding": self.decoding.facts(), "template": self.template}

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """The model's answers."""
        asked = [self.asked[index] for index in chosen]
        said = speaker.say([self._prompt(one) for one in asked], self.decoding, [one.id for one in asked])
        return [{"id": one.id, "question": one.question, "output": text.strip()} for one, text in zip(asked, said, strict=True)]

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """There is none."""
        return {"score": None, "interval": None, "num_rows": len(records)}

    def _prompt(self, asked: Asked) -> str:
        return render(asked.question, "", self.template, self.tokenizer)


@dataclass(frozen=True)
class Judged:
    """Our answers against another model's, which a result of `--task answers` holds."""

    answers: Answers
    others: Mapping[str, str]
    judge: Judge
    name: str = "judge"

    @property
    def ids(self) -> Sequence[str]:
        """The questions."""
        return self.answers.ids

    def facts(self) -> Mapping[str, Any]:
        """Also who judges, how, and the hash of what is compared with."""
        own = {"judge": self.judge.model, "ratings": RATINGS, "temperature": TEMPERATURE, "judge_hash": prompt_hash([ROLE, FORM])}
        return {**self.answers.facts(), **own, "against_hash": prompt_hash([self.others[name] for name in self.ids])}

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """Our answers and all ratings."""
        return [self._rated(record) for record in self.answers.ask(speaker, chosen)]

    def _rated(self, record: Record) -> Record:
        question, ours, theirs = record["question"], record["output"], self.others[record["id"]]
        pairs: list[list[float] | None] = []
        for number in range(RATINGS):
            straight = self.judge.rate(question, theirs, ours, number * TRIES)
            swapped = self.judge.rate(question, ours, theirs, number * TRIES)
            pairs += [None if straight is None else [*straight], None if swapped is None else [*reversed(swapped)]]
        rated = [pair for pair in pairs if pair is not None]
        means = [sum(pair[place] for pair in rated) / len(rated) for place in (0, 1)] if rated else [None, None]
        return {**record, "other": theirs, "ratings": pairs, "other_score": means[0], "our_score": means[1]}

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Our sum over theirs; both sums, as in FedIT's Table 3."""
        rated = [record for record in records if record["our_score"] is not None]
        if not rated:
            raise EvaluationError(f"the judge {self.judge.model} never began a reply with two numbers from 1 to 10: take another")
        ours, theirs = [record["our_score"] for record in rated], [record["other_score"] for record in rated]
        return {
            "score": sum(ours) / sum(theirs),
            "interval": bootstrap(ours, theirs),
            "our_sum": sum(ours),
            "other_sum": sum(theirs),
            "num_rows": len(rated),
            "questions_without_rating": len(records) - len(rated),
        }


def build_answers(options: Options, data: DataConfig, tokenizer: Any) -> Answers:
    """The questions of a file: `question`, or `instruction`, or `text`."""
    records = open_records(options.task, options.data, ("questions.jsonl",))
    asked = []
    for number in draw(len(records), options.rows, options.seed, "questions"):
        values = records[number].values
        text = next((str(values[key]) for key in ("question", "instruction", "text") if values.get(key)), None)
        if text is None:
            raise DataError(f"{records[number].place} has no question: expected a field question, instruction or text")
        asked.append(Asked(str(values.get("question_id", number)), text))
    if twice := [name for name, num in Counter(one.id for one in asked).items() if num > 1]:
        raise DataError(f"{options.data} has question_id {twice[0]} more than once: answers are found by it")
    return Answers(asked, data.template, options.decoding(Decoding(max_new_tokens=256)), tokenizer)


def build_judged(options: Options, data: DataConfig, tokenizer: Any) -> Judged:
    """The comparison, with everything it needs."""
    for key in ("judge_url", "judge_model", "against"):
        if not getattr(options, key):
            raise ConfigError(f"--task judge needs --{key}: --judge_url HTTP-ADDRESS/v1 --judge_model NAME --against answers.json")
    answers = build_answers(options, data, tokenizer)
    try:
        found = json.loads(Path(str(options.against)).read_text(encoding="utf-8"))
        others = {record["id"]: str(record["output"]) for record in found["records"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--against {options.against} is no result of --task answers ({type(error).__name__}: {error})") from None
    if lacking := [name for name in answers.ids if name not in others]:
        raise DataError(f"--against {options.against} has no answer to question {lacking[0]} and {len(lacking) - 1} others")
    return Judged(answers, others, Judge(str(options.judge_url).rstrip("/"), str(options.judge_model)))
