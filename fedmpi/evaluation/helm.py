"""HELM from files, as FS-LLM and FedBiOT score with it: some subtasks, 100 samples of each, one mean. Without shots.

Accuracy is by likelihood: the choice that the model finds likeliest. `helm-qa` is FedBiOT's form, by generated answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.evaluation.heldout import grouped
from fedmpi.evaluation.helm_table import SUBTASKS, SUITES, Question, Subtask, question
from fedmpi.evaluation.intervals import bootstrap, wilson
from fedmpi.evaluation.metrics import OF_RANKS, OF_TEXT, best
from fedmpi.evaluation.task import Options, Record, draw, open_records, prompt_hash

SAMPLES = 100
YES, NO = 0, 1  # the choices of a ranking question


@dataclass(frozen=True)
class Item:
    """One question of one subtask."""

    id: str
    subtask: str
    question: Question


@dataclass(frozen=True)
class Helm:
    """Questions of several subtasks, and the subtasks whose data are not at hand."""

    name: str
    items: Sequence[Item]
    left_out: Mapping[str, str]
    decoding: Decoding
    answers: bool  # FedBiOT's metrics, of generated answers

    @property
    def ids(self) -> Sequence[str]:
        """SUBTASK/NUMBER."""
        return [item.id for item in self.items]

    def facts(self) -> Mapping[str, Any]:
        """As every task."""
        prompts = [prompt for item in self.items for prompt in item.question.prompts]
        metrics = {name: self.metric(name) for name in {item.subtask: 0 for item in self.items}}
        return {"prompt_hash": prompt_hash(prompts), "shots": 0, "decoding": self.decoding.facts(), "metrics": metrics}

    def metric(self, name: str) -> str:
        """How a subtask is scored here."""
        return SUBTASKS[name].answer_metric if self.answers else SUBTASKS[name].metric

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """Records of some questions; those that the model cannot read whole are not asked."""
        items = [self.items[index] for index in chosen]
        fits = {item.id for item in items if self._fits(speaker, item)}
        found = {
            item.id: self._record(item, skipped="it does not fit the model's context") for item in items if item.id not in fits
        }
        said = [item for item in items if item.id in fits and self.metric(item.subtask) in OF_TEXT]
        for tokens in sorted({SUBTASKS[item.subtask].max_new_tokens for item in said}):
            part = [item for item in said if SUBTASKS[item.subtask].max_new_tokens == tokens]
            found |= {record["id"]: record for record in self._say(speaker, part)}
        weighed = [item for item in items if item.id in fits and self.metric(item.subtask) not in OF_TEXT]
        found |= {record["id"]: record for record in self._weigh(speaker, weighed)}
        return [found[item.id] for item in items]

    def _fits(self, speaker: Speaker, item: Item) -> bool:
        longest = max(speaker.lengths(item.question.prompts))
        return longest + self._decoding(SUBTASKS[item.subtask]).max_new_tokens <= speaker.context

    def _decoding(self, subtask: Subtask) -> Decoding:
        own = min(self.decoding.max_new_tokens, subtask.max_new_tokens)
        return Decoding(**{**self.decoding.facts(), "max_new_tokens": own, "stop": ("\n",)})

    def _say(self, speaker: Speaker, items: Sequence[Item]) -> list[Record]:
        decoding = self._decoding(SUBTASKS[items[0].subtask])
        said = speaker.say([item.question.prompts[0] for item in items], decoding, [item.id for item in items])
        scores = [
            best(OF_TEXT[self.metric(item.subtask)], item.question.golds, text) for item, text in zip(items, said, strict=True)
        ]
        return [self._record(item, score=score, output=text) for item, score, text in zip(items, scores, said, strict=True)]

    def _weigh(self, speaker: Speaker, items: Sequence[Item]) -> list[Record]:
        examples = [
            speaker.encode(prompt, f" {choice}", f"{item.id}|{number}|{choice}")
            for item in items
            for number, prompt in enumerate(item.question.prompts)
            for choice in item.question.choices
        ]
        weights = iter([-measure.loss for measure in speaker.measure(examples)])
        records = []
        for item in items:
            table = [[next(weights) for _ in item.question.choices] for _ in item.question.prompts]
            records.append(self._ranked(item, table) if item.question.relevant else self._chosen(item, table[0]))
        return records

    def _chosen(self, item: Item, weights: Sequence[float]) -> Record:
        answer = item.question.choices[max(range(len(weights)), key=lambda index: weights[index])]
        return self._record(item, score=float(answer in item.question.golds), output=answer, weights=list(weights))

    def _ranked(self, item: Item, table: Sequence[Sequence[float]]) -> Record:
        """Passages by how much likelier yes is than no; ties in the file's order."""
        order = sorted(range(len(table)), key=lambda index: table[index][NO] - table[index][YES])
        score = OF_RANKS[self.metric(item.subtask)]([item.question.relevant[index] for index in order])
        return self._record(item, score=score, output=order)

    def _record(self, item: Item, **found: Any) -> Record:
        return {"id": item.id, "subtask": item.subtask, "gold": list(item.question.golds), **found}

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The mean over subtasks that could be asked whole, each with its own interval."""
        subtasks, left_out = {}, dict(self.left_out)
        for name, found in grouped(records, "subtask").items():
            scores = [record["score"] for record in found if "score" in record]
            if len(scores) < len(found):
                left_out[name] = f"{len(found) - len(scores)} of {len(found)} inputs do not fit the model's context"
            else:
                right_or_wrong = self.metric(name) in ("accuracy", "exact_match", "quasi_exact_match")
                interval = wilson(int(sum(scores)), len(scores)) if right_or_wrong else bootstrap(scores)
                mean = sum(scores) / len(scores)
                subtasks[name] = {"score": mean, "metric": self.metric(name), "num": len(scores), "interval": interval}
        if not subtasks:
            raise DataError(f"{self.name}: no subtask could be scored ({'; '.join(f'{k}: {v}' for k, v in left_out.items())})")
        whole = [(r["score"], 1 / subtasks[r["subtask"]]["num"]) for r in records if r["subtask"] in subtasks]
        return {
            "score": sum(found["score"] for found in subtasks.values()) / len(subtasks),
            "interval": bootstrap([score * share for score, share in whole], [share for _, share in whole]),
            "subtasks": subtasks,
            "num_subtasks": len(subtasks),
            "left_out": left_out,
        }


def build(options: Options, suite: str, only: str) -> Helm:
    """A suite, or one subtask as helm:NAME or helm-qa:NAME."""
    names = SUITES[suite]
    if only and only not in names:
        raise ConfigError(f"--task {options.task}: {suite} has {', '.join(names)}")
    items, left_out = [], {}
    for name in (only,) if only else names:
        try:
            items += _items(options, name)
        except _Missing as error:
            left_out[name] = str(error)
    if not items:
        raise DataError(f"--task {options.task} finds no data: {next(iter(left_out.values()))}")
    return Helm(options.task, items, left_out, options.decoding(Decoding(max_new_tokens=128)), suite == "helm-qa")


class _Missing(DataError):
    """A subtask's file is not there."""


def _items(options: Options, name: str) -> list[Item]:
    subtask = SUBTASKS[name]
    try:
        found = open_records(options.task, options.data, subtask.files)
    except DataError as error:
        raise _Missing(f"{error}; its records have {subtask.fields}") from None
    chosen = draw(len(found), options.rows or SAMPLES, options.seed, name)
    return [Item(f"{name}/{index}", name, question(name, found[index])) for index in chosen]
