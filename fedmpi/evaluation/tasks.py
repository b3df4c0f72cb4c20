"""From a task's name and a user's options to the task, with its data opened. A name is looked up here and nowhere else."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedmpi import data
from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation import code, gsm8k, helm, judge
from fedmpi.evaluation.decoding import Decoding
from fedmpi.evaluation.heldout import ExactMatch, Perplexity
from fedmpi.evaluation.helm_table import SUITES
from fedmpi.evaluation.task import Heldout, Options, Task, draw


@dataclass(frozen=True)
class Subject:
    """What a task may know of whom it asks: how its rows were made, and its tokenizer."""

    options: Options
    tokenizer: Any
    data: data.Config
    clients: int | None
    seed: int


def build(subject: Subject) -> Task:
    """The task that the options name."""
    name, _, rest = subject.options.task.partition(":")
    if name not in TASKS:
        raise ConfigError(f"--task {subject.options.task!r} is not known; there are {', '.join(sorted(TASKS))}")
    return TASKS[name](subject, rest)


def _heldout(subject: Subject) -> Heldout:
    """The rows that nobody trained on, or all rows of the file that the user gives."""
    wanted, options = subject.data, subject.options
    if options.data is not None:
        rows = data.load(replace(wanted, name="json", path=options.data, num_rows=None), subject.seed).train
        owners, num, source = dict[str, int](), 0, "all rows of --data"
    else:
        parties = data.federate(wanted, subject.clients, subject.seed, () if data.has_common(wanted) else None)
        own = [(row, client.id) for client in parties.clients for row in client.heldout]
        rows, num, source = parties.heldout or [row for row, _ in own], len(parties.clients) if own else 0, parties.heldout_from
        owners = {row.id: client for row, client in own}
    chosen = draw(len(rows), options.rows, options.seed, "heldout")
    if not chosen:
        raise DataError(f"{wanted.name} has no held-out rows: give --data FILE")
    return Heldout([rows[index] for index in chosen], owners, num, source)


def _perplexity(subject: Subject, rest: str) -> Task:
    heldout = _heldout(subject)
    examples, counts = data.tokenize(heldout.rows, subject.tokenizer, subject.data)
    if not examples:
        raise DataError(f"none of the {counts.rows} held-out rows has a token to predict ({counts})")
    about = {"max_length": subject.data.max_length, "counts": asdict(counts), **_template(subject)}
    return Perplexity(heldout, examples, about)


def _exact_match(subject: Subject, rest: str) -> Task:
    decoding = subject.options.decoding(Decoding(max_new_tokens=64))
    return ExactMatch(_heldout(subject), subject.data.template, decoding, _template(subject), subject.tokenizer)


def _gsm8k(subject: Subject, rest: str) -> Task:
    options = subject.options
    if options.data is None and "gsm8k" not in subject.data.name:
        raise ConfigError("--task gsm8k needs --data: the test file, or its folder (the run was not trained on gsm8k)")
    own = options.data is None
    wanted = subject.data if own else replace(subject.data, name="gsm8k", path=options.data, fields={}, num_rows=None)
    corpus = data.load(wanted, subject.seed)
    rows = corpus.test if own else corpus.test or corpus.train
    if not rows:
        raise DataError("the run's gsm8k has no test split: give --data FILE")
    chosen = [rows[index] for index in draw(len(rows), options.rows, options.seed, "gsm8k")]
    decoding = options.decoding(gsm8k.DECODING)
    return gsm8k.build(chosen, options.shots, options.form, subject.data.template, decoding, subject.tokenizer)


def _humaneval(subject: Subject, rest: str) -> Task:
    return code.build(subject.options, "python", plain=True)


def _humaneval_x(subject: Subject, rest: str) -> Task:
    return code.build(subject.options, rest, plain=False)


def _helm(suite: str) -> Callable[[Subject, str], Task]:
    return lambda subject, rest: helm.build(subject.options, suite, rest)


def _answers(subject: Subject, rest: str) -> Task:
    return judge.build_answers(subject.options, subject.data, subject.tokenizer)


def _judge(subject: Subject, rest: str) -> Task:
    return judge.build_judged(subject.options, subject.data, subject.tokenizer)


def _template(subject: Subject) -> dict[str, str | None]:
    name = subject.data.template
    return {"template": name, "template_hash": data.template_hash(name, subject.tokenizer)}


TASKS: Mapping[str, Callable[[Subject, str], Task]] = {
    "perplexity": _perplexity,
    "exact_match": _exact_match,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "humaneval-x": _humaneval_x,
    "answers": _answers,
    "judge": _judge,
    **{suite: _helm(suite) for suite in SUITES},
}
