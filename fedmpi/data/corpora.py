"""Corpora: from a name and a file, a folder or the hub to rows. It must never know clients or tokens."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy

from fedmpi.data import Config, files, tables, toy
from fedmpi.data.declared import CORPORA, FEDERATED, OWN, Declaration, FederatedSet
from fedmpi.data.records import Record
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


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: an instruction, perhaps with an input, and the response to learn."""

    instruction: str
    input: str
    output: str
    category: str
    id: str


@dataclass(frozen=True)
class Corpus:
    """A corpus in memory. `test` is empty where the data set has no test split."""

    name: str
    train: list[Row]
    test: list[Row]
    declared: Declaration
    federated: FederatedSet | None = None  # where the name is that of a federated data set
    files: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """The rows of a training or test part and what the run record says of where they are from."""

    rows: list[Row]
    facts: Mapping[str, object]


def load(config: Config, seed: int) -> Corpus:
    """Read the corpus a configuration names. The seed matters only where `num_rows` draws some of its rows."""
    federated = FEDERATED.get(config.name)
    declared, wanted = declaration(config.name), parse_fields(config.fields)
    if config.name == "builtin:toy":
        return _toy(config, declared, wanted)
    if config.path:
        paths = _locate(config, declared)
        parts = {part: _from_files(config.name, declared, wanted, part, found) for part, found in paths.items()}
    else:
        parts = _from_hub(config.name, declared, wanted)
    train = _draw(parts["train"].rows, config.num_rows, seed)
    test = parts["test"].rows if "test" in parts else []
    return Corpus(config.name, train, test, declared, federated, {part: found.facts for part, found in parts.items()})


def declaration(name: str) -> Declaration:
    """What is known of the corpus that a name stands for."""
    known = FEDERATED[name].corpus if name in FEDERATED else name
    if known not in CORPORA:
        raise ConfigError(f"data.name is {name!r}: allowed are {', '.join([*CORPORA, *FEDERATED])}")
    return CORPORA[known]


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


def _locate(config: Config, declared: Declaration) -> dict[str, list[Path]]:
    """A file is the training rows; a folder is searched for both parts."""
    known = " or ".join(declared.train_files)
    path = Path(config.path or "").expanduser()
    if path.is_file():
        found = {"train": [path]}
    elif path.is_dir():
        found = {"train": files.find(path, declared.train_files), "test": files.find(path, declared.test_files)}
    else:
        raise DataError(f"data.path {config.path} is neither a file nor a folder: give a file, or a folder with {known}")
    if not found["train"]:
        raise DataError(f"data.path {config.path} has none of the files known for {config.name}: {known}, plain or compressed")
    for path in (path for paths in found.values() for path in paths):
        if declared.kinds and files.kind(path) not in declared.kinds:
            fitting = next((name for name, kinds in OWN.items() if files.kind(path) in kinds), None)
            hint = f"give data.name {fitting}" if fitting else f"its own names are {', '.join(OWN)}"
            raise DataError(f"{path} is no file for data.name {config.name}, which reads {', '.join(declared.kinds)}: {hint}")
    return {part: paths for part, paths in found.items() if paths}


def _from_files(name: str, declared: Declaration, wanted: Mapping[str, str], part: str, paths: Sequence[Path]) -> Part:
    digests: list[str] = []
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} and others"
    found = _part(_opened(paths, digests), _reading(name, declared, declared.fields, wanted), part, where)
    sha = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    called = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
    return replace(found, facts={"name": called, "sha256": sha, **found.facts})


def _opened(paths: Sequence[Path], digests: list[str]) -> Iterator[Record]:
    """The records of all files, those of one file in memory at a time."""
    for path in paths:
        records, sha = files.read(path)
        digests.append(sha)
        yield from records


def _from_hub(name: str, declared: Declaration, wanted: Mapping[str, str]) -> dict[str, Part]:
    hub = declared.hub
    if hub is None:
        known = " or ".join(declared.train_files)
        raise ConfigError(f"data.name {name} needs data.path: a file, or a folder with {known} (source: {declared.source})")
    reading = _reading(name, declared, hub.fields or declared.fields, wanted)
    parts = {}
    for part, split in hub.parts.items():
        digest = hashlib.sha256()
        found = _part(tables.from_hub(hub.name, hub.subset, split, digest.update), reading, part, hub.name)
        parts[part] = replace(found, facts={"name": hub.name, "sha256": digest.hexdigest(), **found.facts})
    return parts


@dataclass(frozen=True)
class _Reading:
    """How the records of one corpus become rows."""

    name: str
    declared: Declaration
    names: Mapping[str, tuple[str, ...]]  # role -> what it may be called
    required: frozenset[str]


def _reading(name: str, declared: Declaration, fields: Mapping[str, str], wanted: Mapping[str, str]) -> _Reading:
    named = {**fields, **wanted}
    usual = USUAL_NAMES if name in OWN else dict.fromkeys(ROLES, ())
    names = {role: (named[role],) if role in named else usual[role] for role in ROLES}
    return _Reading(name, declared, names, frozenset({"instruction", "response", *named} - {"input"}))


def _part(found: Iterable[Record], reading: _Reading, part: str, where: str) -> Part:
    """Rows of the records, without the categories that the declaration drops; what was dropped and cleaned is told."""
    declared, inputs = reading.declared, reading.names["input"]
    rows, dropped, num_cleaned, has_input = [], Counter[str](), 0, len(inputs) != 1
    for index, record in enumerate(found):
        row, was_cleaned = _row(record, f"{part}:{index}", reading)
        has_input = has_input or inputs[0] in record.values
        if row.category in declared.dropped:
            dropped[row.category] += 1
            continue
        if declared.categories and row.category not in declared.categories:
            known = ", ".join(declared.categories)
            raise DataError(f"{record.place} has the unknown category {row.category!r}: {reading.name} has {known}")
        rows.append(row)
        num_cleaned += was_cleaned
    if not has_input:
        raise DataError(f"{where} has no field {inputs[0]!r} in any record: give the right name in data.fields input=...")
    told: dict[str, object] = {"rows": len(rows)}
    told |= {"dropped": dict(sorted(dropped.items()))} if dropped else {}
    told |= {"cleaned": num_cleaned} if declared.cleaned else {}
    return Part(rows, told)


def _row(record: Record, row_id: str, reading: _Reading) -> tuple[Row, bool]:
    """The row and whether a character of it was replaced."""
    raw = [_value(record, role, reading.names[role], role in reading.required) for role in ROLES]
    instruction, given, response, category = values = [_clean(text, reading.declared.cleaned) for text in raw]
    return Row(instruction, given, response, category, row_id), values != raw


def _clean(text: str, cleaned: Mapping[str, str]) -> str:
    for bad, good in cleaned.items():
        text = text.replace(bad, good)
    return text


def _value(record: Record, role: str, names: tuple[str, ...], required: bool) -> str:
    value = next((record.values[name] for name in names if name in record.values), None)
    if value is None and required:
        expected, found = " or ".join(map(repr, names)), ", ".join(sorted(map(str, record.values))) or "none"
        raise DataError(f"{record.place} has no {role}: expected field {expected}, found {found}; set data.fields {role}=NAME")
    if isinstance(value, dict | list):
        raise DataError(f"{record.place} has a {type(value).__name__} as its {role}: expected text")
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{record.place} has half a surrogate pair in its {role}: it is not Unicode text; mend it or take it out"
        ) from None
    return text


def _draw(rows: list[Row], num: int | None, seed: int) -> list[Row]:
    """A seeded sample in the file's order."""
    if num is None:
        return rows
    if num > len(rows):
        raise ConfigError(f"data.num_rows is {num}, but there are only {len(rows)} training rows")
    chosen = numpy.random.default_rng(seed_for(seed, "rows")).choice(len(rows), num, replace=False)
    return [rows[i] for i in sorted(chosen)]
