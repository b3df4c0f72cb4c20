"""GSM8K: a chain of thought, with or without worked examples before the question; right when the last number is.

Numbers are compared as numbers (18.0 is 18; 1,200 is 1200). The original code compared their digits.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from fedmpi.data.corpora import Row
from fedmpi.data.prompts import render, template_hash
from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.evaluation.heldout import shares
from fedmpi.evaluation.shots import fitting
from fedmpi.evaluation.task import Record, prompt_hash

GOLD = "####"
MARKS = re.compile(r"the answer is|####", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<![\d)])-)?\s?\$?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
BARE, TRAINING = "bare", "training"
STOPS = {BARE: ("\nQ:", "\nQuestion:"), TRAINING: ("\n### Instruction:", "\nBelow is an instruction")}
DECODING = Decoding(max_new_tokens=256)


@dataclass(frozen=True)
class Shot:
    """A worked example."""

    question: str
    answer: str


@dataclass(frozen=True)
class Gsm8k:
    """Questions, worked examples, and the form in which both are put."""

    rows: Sequence[Row]
    shots: Sequence[Shot]
    form: str  # bare: Q and A; training: the template that the model was trained with
    template: str
    decoding: Decoding
    tokenizer: Any = None  # for the template `chat`
    name: str = "gsm8k"

    @property
    def ids(self) -> Sequence[str]:
        """The questions."""
        return [row.id for row in self.rows]

    def facts(self) -> Mapping[str, Any]:
        """The hash is of prompts with all shots; how many of these fitted is in each record."""
        prompts = [self.prompt(row, len(self.shots)) for row in self.rows]
        form = {"form": self.form} | (
            {"template_hash": template_hash(self.template, self.tokenizer)} if self.form == TRAINING else {}
        )
        return {"prompt_hash": prompt_hash(prompts), "shots": len(self.shots), "decoding": self.decoding.facts(), **form}

    def prompt(self, row: Row, num_shots: int) -> str:
        """The question after the first so many shots."""
        parts = [self._ask(shot.question) + self._reply(shot.answer) for shot in self.shots[:num_shots]]
        return "\n\n".join([*parts, self._ask(row.instruction)])

    def _ask(self, question: str) -> str:
        return f"Q: {question}\nA:" if self.form == BARE else render(question, "", self.template, self.tokenizer)

    def _reply(self, answer: str) -> str:
        return f" {answer}" if self.form == BARE else answer

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """Answers, each after as many whole shots as its model can read."""
        rows = [self.rows[index] for index in chosen]
        wanted, room = [len(self.shots)] * len(rows), speaker.context - self.decoding.max_new_tokens
        found = fitting(speaker, wanted, [room] * len(rows), lambda index, num: [self.prompt(rows[index], num)])
        kept = [max(0, num) for num in found]  # a question that does not fit by itself loses its left end
        prompts = [self.prompt(row, num) for row, num in zip(rows, kept, strict=True)]
        said = speaker.say(prompts, self.decoding, [row.id for row in rows])
        return [_record(row, num, text) for row, num, text in zip(rows, kept, said, strict=True)]

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """Accuracy, and how many shots were left out."""
        dropped = [len(self.shots) - record["shots"] for record in records]
        return {
            **shares(records),
            "shots_dropped": sum(dropped),
            "questions_without_all_shots": sum(map(bool, dropped)),
            "answers_without_a_number": sum(record["prediction"] is None for record in records),
        }


def _record(row: Row, num_shots: int, text: str) -> Record:
    wanted, found = gold(row.output, row.id), prediction(text)
    return {
        **{"id": row.id, "shots": num_shots, "output": text, "gold": str(wanted)},
        **{"prediction": None if found is None else str(found), "right": found == wanted},
    }


def gold(answer: str, name: str) -> Decimal:
    """The number after the last ####."""
    _, mark, rest = answer.rpartition(GOLD)
    found = NUMBER.search(rest) if mark else None
    if not found:
        raise DataError(f"gsm8k {name}: its answer has no number after {GOLD}; expected the published form")
    return _number(found[0])


def prediction(text: str) -> Decimal | None:
    """The number after the first "the answer is" or ####; without these, the last number that is said."""
    text = text.replace("\u2212", "-")
    for mark in MARKS.finditer(text):
        if found := NUMBER.search(text, mark.end()):
            return _number(found[0])
    every = NUMBER.findall(text)
    return _number(every[-1]) if every else None


def _number(text: str) -> Decimal:
    return Decimal(re.sub(r"[,$\s]", "", text)).normalize()


def read_shots(path: str) -> list[Shot]:
    """Worked examples of a text file: Q: and A: pairs, blank lines between them."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--shots {path} cannot be read: {error}") from None
    shots = []
    for number, part in enumerate(re.split(r"\n\s*\n(?=Q:)", text.strip()), start=1):
        found = re.fullmatch(r"Q:\s*(.*?)\s*\nA:\s*(.*)", part.strip(), re.DOTALL)
        if not found:
            raise DataError(f"--shots {path}, example {number} is no pair of Q: and A: (it begins {part.strip()[:30]!r})")
        shots.append(Shot(found[1], found[2]))
    return shots


def build(
    rows: Sequence[Row], examples: str | None, form: str | None, template: str, decoding: Decoding, tokenizer: Any = None
) -> Gsm8k:
    """The task as asked for; with shots the form of the literature, without them the form of training."""
    form = form or (BARE if examples else TRAINING)
    if form not in STOPS:
        raise ConfigError(f"--form {form!r} is not known; there are {', '.join(STOPS)}")
    asked = Decoding(**{**decoding.facts(), "stop": STOPS[form]})
    for row in rows:
        gold(row.output, row.id)
    return Gsm8k(rows, read_shots(examples) if examples else [], form, template, asked, tokenizer)
