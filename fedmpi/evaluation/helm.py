"""HELM from files, as FS-LLM and FedBiOT score with it: some subtasks, 100 samples of each, one mean.

Accuracy is by likelihood: the choice that the model finds likeliest. `helm-qa` is FedBiOT's form, by generated answers.
All questions of a subtask (in MMLU: of a subject) follow the same worked examples; those that do not fit are dropped whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedmpi.data import files
from fedmpi.data.records import Record as FileRecord
from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.evaluation.heldout import grouped
from fedmpi.evaluation.helm_table import SUBTASKS, SUITES, Question, Subtask, question
from fedmpi.evaluation.intervals import bootstrap, wilson
from fedmpi.evaluation.metrics import OF_RANKS, OF_TEXT, best
from fedmpi.evaluation.shots import choose, fitting
from fedmpi.evaluation.task import Options, Record, draw, located, open_records, prompt_hash

SAMPLES = 100
YES, NO = 0, 1  # the choices of a ranking question


@dataclass(frozen=True)
class Item:
    """One question of one subtask, and the worked examples before it."""

    id: str
    subtask: str
    question: Question
    shots: tuple[str, ...] = ()

    def prompts(self, num_shots: int | None = None) -> list[str]:
        """What the model reads: head, the first so many examples (all without a number), and the question, in each of its forms."""
        before = [*filter(None, [self.question.head]), *self.shots[:num_shots]]
        return ["\n\n".join([*before, prompt]) for prompt in self.question.prompts]


@dataclass(frozen=True)
class Helm:
    """Questions of several subtasks, and the subtasks whose data are not at hand."""

    name: str
    items: Sequence[Item]
    left_out: Mapping[str, str]
    decoding: Decoding
    answers: bool  # FedBiOT's metrics, of generated answers
    shots_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> Sequence[str]:
        """SUBTASK/NUMBER."""
        return [item.id for item in self.items]

    def facts(self) -> Mapping[str, Any]:
        """As every task."""
        prompts = [prompt for item in self.items for prompt in item.prompts()]
        own = {"metrics": {item.subtask: self.metric(item.subtask) for item in self.items}, "shots_from": self.shots_from}
        num_shots = {item.subtask: len(item.shots) for item in self.items}
        return {"prompt_hash": prompt_hash(prompts), "shots": num_shots, "decoding": self.decoding.facts(), **own}

    def metric(self, name: str) -> str:
        """How a subtask is scored here."""
        return SUBTASKS[name].answer_metric if self.answers else SUBTASKS[name].metric

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """Records of some questions, each after as many examples as the model can read; those that do not fit are not asked."""
        asked = [self.items[index] for index in chosen]
        rooms = [speaker.context - self._decoding(SUBTASKS[item.subtask]).max_new_tokens for item in asked]
        sizes = [len(item.shots) for item in asked]
        kept = fitting(speaker, sizes, rooms, lambda index, num: asked[index].prompts(num))
        items = [replace(item, shots=item.shots[:num]) for item, num in zip(asked, kept, strict=True) if num >= 0]
        found = {item.id: self._record(replace(item, shots=()), skipped="it does not fit the model's context") for item in asked}
        said = [item for item in items if self.metric(item.subtask) in OF_TEXT]
        for tokens in sorted({SUBTASKS[item.subtask].max_new_tokens for item in said}):
            part = [item for item in said if SUBTASKS[item.subtask].max_new_tokens == tokens]
            found |= {record["id"]: record for record in self._say(speaker, part)}
        weighed = [item for item in items if self.metric(item.subtask) not in OF_TEXT]
        found |= {record["id"]: record for record in self._weigh(speaker, weighed)}
        return [found[item.id] for item in asked]

    def _decoding(self, subtask: Subtask) -> Decoding:
        own = min(self.decoding.max_new_tokens, subtask.max_new_tokens)
        return Decoding(**{**self.decoding.facts(), "max_new_tokens": own, "stop": ("\n",)})

    def _say(self, speaker: Speaker, items: Sequence[Item]) -> list[Record]:
        decoding = self._decoding(SUBTASKS[items[0].subtask])
        said = speaker.say([item.prompts()[0] for item in items], decoding, [item.id for item in items])
        scores = [
            best(OF_TEXT[self.metric(item.subtask)], item.question.golds, text) for item, text in zip(items, said, strict=True)
        ]
        return [self._record(item, score=score, output=text) for item, score, text in zip(items, scores, said, strict=True)]

    def _weigh(self, speaker: Speaker, items: Sequence[Item]) -> list[Record]:
        examples = [
            speaker.encode(prompt, f" {choice}", f"{item.id}|{number}|{choice}")
            for item in items
            for number, prompt in enumerate(item.prompts())
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
        return {"id": item.id, "subtask": item.subtask, "shots": len(item.shots), "gold": list(item.question.golds), **found}

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The mean over subtasks that could be asked whole, each with its own interval."""
        subtasks, left_out = {}, dict(self.left_out)
        wanted = {item.id: len(item.shots) for item in self.items}
        for name, found in grouped(records, "subtask").items():
            scores = [record["score"] for record in found if "score" in record]
            if len(scores) < len(found):
                left_out[name] = f"{len(found) - len(scores)} of {len(found)} inputs do not fit the model's context"
            else:
                right_or_wrong = self.metric(name) in ("accuracy", "exact_match", "quasi_exact_match")
                interval = wilson(int(sum(scores)), len(scores)) if right_or_wrong else bootstrap(scores)
                mean = sum(scores) / len(scores)
                dropped = sum(wanted[record["id"]] - record["shots"] for record in found)
                about = {"metric": self.metric(name), "num": len(scores), "shots_dropped": dropped}
                subtasks[name] = {"score": mean, **about, "interval": interval}
        if not subtasks:
            raise DataError(f"{self.name}: no subtask could be scored ({'; '.join(f'{k}: {v}' for k, v in left_out.items())})")
        whole = [(r["score"], 1 / subtasks[r["subtask"]]["num"]) for r in records if r["subtask"] in subtasks]
        return {
            "score": sum(found["score"] for found in subtasks.values()) / len(subtasks),
            "interval": bootstrap([score * share for score, share in whole], [share for _, share in whole]),
            "subtasks": subtasks,
            "num_subtasks": len(subtasks),
            "shots_dropped": sum(found["shots_dropped"] for found in subtasks.values()),
            "left_out": left_out,
        }


def build(options: Options, suite: str, only: str) -> Helm:
    """A suite, or one subtask as helm:NAME or helm-qa:NAME."""
    if only and only not in SUITES[suite]:
        raise ConfigError(f"--task {options.task}: {suite} has {', '.join(SUITES[suite])}")
    names = (only,) if only else SUITES[suite]
    items, left_out, shots_from = [], {}, {}
    for name in names:
        if located(options.data, SUBTASKS[name].files) is None:
            left_out[name] = f"needs --data: {' or '.join(SUBTASKS[name].files)}, whose records have {SUBTASKS[name].fields}"
            continue
        found, shots_from[name] = _items(options, name)
        items += found
    if not items:
        where = "none is given" if options.data is None else f"{options.data} holds none of its files"
        raise DataError(f"--task {options.task} finds no data, {where}: {names[0]} {left_out[names[0]]}")
    decoding = options.decoding(Decoding(max_new_tokens=128))
    return Helm(options.task, items, left_out, decoding, suite == "helm-qa", shots_from)


def _items(options: Options, name: str) -> tuple[list[Item], str]:
    """A subtask's questions after worked examples, and where these are from."""
    subtask = SUBTASKS[name]
    found = open_records(options.task, options.data, subtask.files)
    chosen = draw(len(found), options.rows or SAMPLES, options.seed, name)
    items = [Item(f"{name}/{index}", name, question(name, found[index])) for index in chosen]
    num_shots = _num_shots(options, subtask)
    if not num_shots:
        return items, "none are asked for"
    pool, source = _pool(options, name, [found[index] for index in sorted({*range(len(found))} - {*chosen})])
    groups = {item.question.group for item in items}
    drawn = {group: _drawn([one for one in pool if one.group == group], num_shots, options.seed, name) for group in groups}
    return [replace(item, shots=drawn[item.question.group]) for item in items], source


def _num_shots(options: Options, subtask: Subtask) -> int:
    if options.shots is None:
        return subtask.shots
    if not options.shots.isdecimal():
        raise ConfigError(
            f"--shots is {options.shots!r}: --task {options.task} draws its examples itself, give their number (0, 5)"
        )
    return int(options.shots)


def _pool(options: Options, name: str, rest: Sequence[FileRecord]) -> tuple[list[Question], str]:
    """The questions that may become worked examples: never one that is asked."""
    folder = Path(options.data or "").expanduser()
    there = files.find(folder, (f"{name}_train.jsonl", *SUBTASKS[name].train)) if folder.is_dir() else []
    records = files.read(there[0])[0] if there else rest
    return [question(name, record) for record in records], there[0].name if there else "rows that are not asked"


def _drawn(pool: Sequence[Question], num: int, seed: int, name: str) -> tuple[str, ...]:
    worked = [one for question in pool for one in question.worked()]
    chosen = choose([answer for _, answer in worked], num, seed, f"{name} {pool[0].group if pool else ''}")
    return tuple(f"{worked[index][0]} {worked[index][1]}" for index in chosen)
