"""Corpora: what a data set is called, where its files are, and its rows. It must never know clients or tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from fedmpi.data import Config, records, toy
from fedmpi.errors import ConfigError, DataError
from fedmpi.seeding import seed_for

ROLES = ("instruction", "input", "response", "category")
USUAL_NAMES = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "response": ("output", "response"),
    "category": ("category",),
}
TOY_SEED = 0  # the built-in data are one fixed corpus, whatever the seed of a run


@dataclass(frozen=True)
class Row:
    """One sample: an instruction, perhaps with an input, and the response to learn."""

    instruction: str
    input: str
    output: str
    category: str
    id: str


@dataclass(frozen=True)
class Declaration:
    """What is known of a corpus before its files are opened."""

    fields: Mapping[str, str]  # role -> name in the file; empty: the usual names
    licence: str
    source: str
    rows: tuple[int, int] | None  # train and test rows of the published release
    train_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    splitter: str = "iid"
    clients: int | None = None  # None with splitter meta: one client per category


@dataclass(frozen=True)
class Corpus:
    """A corpus in memory. `test` is empty where the data set has no test split."""

    name: str
    train: list[Row]
    test: list[Row]
    declared: Declaration
    files: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


CORPORA: Mapping[str, Declaration] = {
    "builtin:toy": Declaration(
        fields={},
        licence="Apache-2.0",
        source="made by fedmpi/data/toy.py",
        rows=(4096, 512),
        splitter="meta",
    ),
    "gsm8k": Declaration(
        fields={"instruction": "question", "response": "answer"},
        licence="MIT",
        source="https://github.com/openai/grade-school-math",
        rows=(7473, 1319),
        train_files=("train.jsonl", "gsm8k_train.jsonl", "grade_school_math/data/train.jsonl"),
        test_files=("test.jsonl", "gsm8k_test.jsonl", "grade_school_math/data/test.jsonl"),
        clients=3,
    ),
    "dolly": Declaration(
        fields={"instruction": "instruction", "input": "context", "response": "response", "category": "category"},
        licence="CC BY-SA 3.0",
        source="https://huggingface.co/datasets/databricks/databricks-dolly-15k",
        rows=(15011, 0),
        train_files=("databricks-dolly-15k.jsonl", "new-databricks-dolly-15k.json"),
        splitter="meta",
    ),
    "json": Declaration(
        fields={},
        licence="the user's",
        source="the user's",
        rows=None,
        train_files=("train.jsonl", "train.json", "data.jsonl", "data.json"),
        test_files=("test.jsonl", "test.json"),
    ),
}


def load(config: Config, seed: int) -> Corpus:
    """Read the corpus a configuration names. The seed matters only where `num_rows` draws some of its rows."""
    if config.name not in CORPORA:
        raise ConfigError(f"data.name is {config.name!r}: allowed are {', '.join(CORPORA)}")
    declared, wanted = CORPORA[config.name], parse_fields(config.fields)
    if config.name == "builtin:toy":
        return _toy(config, declared, wanted)
    paths = _locate(config, declared)
    names = {role: (name,) for role, name in {**declared.fields, **wanted}.items()} or USUAL_NAMES
    names = {**USUAL_NAMES, **names} if config.name == "json" else names
    read = {part: _read(path, part, names, required=set(declared.fields) | set(wanted)) for part, path in paths.items()}
    train, test = read["train"][0], read["test"][0] if "test" in read else []
    files = {part: {"name": paths[part].name, "rows": len(rows), "sha256": sha} for part, (rows, sha) in read.items()}
    return Corpus(config.name, _draw(train, config.num_rows, seed), test, declared, files)


def parse_fields(fields: Mapping[str, str] | str) -> dict[str, str]:
    """`instruction=q,response=a` or a mapping, as role -> name of the field in the file."""
    pairs = dict(fields) if isinstance(fields, Mapping) else dict(_pair(part) for part in fields.split(",") if part.strip())
    if unknown := sorted(set(pairs) - set(ROLES)):
        raise ConfigError(f"data.fields names {', '.join(unknown)}: allowed roles are {', '.join(ROLES)}")
    return pairs


def _pair(text: str) -> tuple[str, str]:
    role, equals, name = (part.strip() for part in text.partition("="))
    if not (role and equals and name):
        raise ConfigError(f"data.fields has {text.strip()!r}: expected ROLE=FIELD, as in instruction=q,response=a")
    return role, name


def _toy(config: Config, declared: Declaration, wanted: Mapping[str, str]) -> Corpus:
    if config.path or wanted:
        raise ConfigError("builtin:toy is made by the program: give no data.path and no data.fields, or another data.name")
    assert declared.rows
    made = {"train": config.num_rows or declared.rows[0], "test": declared.rows[1]}
    rows = {
        part: [Row(**values, id=f"{part}:{i}") for i, values in enumerate(toy.rows(num, TOY_SEED, part))]
        for part, num in made.items()
    }
    return Corpus(config.name, rows["train"], rows["test"], declared)


def _locate(config: Config, declared: Declaration) -> dict[str, Path]:
    """A file is the training rows; a folder is searched for both parts."""
    known = " or ".join(declared.train_files)
    if not config.path:
        raise ConfigError(f"data.name {config.name} needs data.path: a file, or a folder with {known} (source: {declared.source})")
    path = Path(config.path).expanduser()
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(f"data.path {config.path} is neither a file nor a folder: give a file, or a folder with {known}")
    train, test = records.find(path, declared.train_files), records.find(path, declared.test_files)
    if train is None:
        raise DataError(f"data.path {config.path} has none of the files known for {config.name}: {known}, plain or with .gz")
    return {"train": train, "test": test} if test else {"train": train}


def _read(path: Path, part: str, names: Mapping[str, tuple[str, ...]], required: set[str]) -> tuple[list[Row], str]:
    found, sha = records.read(path)
    if "input" in required and not any(name in record.values for record in found for name in names["input"]):
        raise DataError(f"{path} has no field {names['input'][0]!r} in any record: give the right name in data.fields input=...")
    required = (required | {"instruction", "response"}) - {"input"}
    return [_row(record, f"{part}:{i}", names, required) for i, record in enumerate(found)], sha


def _row(record: records.Record, row_id: str, names: Mapping[str, tuple[str, ...]], required: set[str]) -> Row:
    values = {role: _value(record, role, names.get(role, ()), role in required) for role in ROLES}
    return Row(values["instruction"], values["input"], values["response"], values["category"], row_id)


def _value(record: records.Record, role: str, names: tuple[str, ...], required: bool) -> str:
    value = next((record.values[name] for name in names if name in record.values), None)
    if value is None and required:
        expected, found = " or ".join(map(repr, names)), ", ".join(sorted(record.values)) or "none"
        raise DataError(f"{record.place} has no {role}: expected field {expected}, found {found}; set data.fields {role}=NAME")
    if isinstance(value, dict | list):
        raise DataError(f"{record.place} has a {type(value).__name__} as its {role}: expected text")
    text = "" if value is None else str(value)
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(f"{record.place} has half a surrogate pair in its {role}: it is not Unicode text; mend it or take it out")
    return text


def _draw(rows: list[Row], num: int | None, seed: int) -> list[Row]:
    """A seeded sample in the file's order."""
    if num is None:
        return rows
    if num > len(rows):
        raise ConfigError(f"data.num_rows is {num}, but there are only {len(rows)} training rows")
    chosen = numpy.random.default_rng(seed_for(seed, "rows")).choice(len(rows), num, replace=False)
    return [rows[i] for i in sorted(chosen)]
