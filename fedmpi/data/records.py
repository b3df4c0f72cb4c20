"""JSON and JSONL as records that know their place. It must never know files or what a corpus is."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmpi.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of a file and where it stands, in words a user can act on."""

    values: dict[str, object]
    place: str


def parse(path: Path, content: bytes) -> Iterator[Record]:
    """The records of a JSON array, or one of each line."""
    return _array(path, content) if content.lstrip()[:1] == b"[" else _lines(path, content)


def text(content: bytes, place: str) -> str:
    """The content as text, or where it is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = place if line == 1 else f"{place} line {line}"
        raise DataError(f"{where} is not UTF-8 (byte {content[error.start]:#04x}): save the file as UTF-8") from None


def _lines(path: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{path} line {number}"
            yield _record(_values(text(line, place), place), place)


def _array(path: Path, content: bytes) -> Iterator[Record]:
    for number, values in enumerate(_values(text(content, str(path)), str(path)), start=1):
        yield _record(values, f"{path} record {number}")


def _values(text: str, place: str) -> list[object]:
    try:
        return json.loads(text)  # type: ignore[no-any-return]
    except json.JSONDecodeError as error:
        where = place if "\n" not in text.strip() else f"{place} line {error.lineno}"
        raise DataError(f"{where} is not JSON ({error.msg}, column {error.colno}): mend it or take it out") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{place} cannot be read: {' '.join(str(error).split(';')[0].split())}") from None
    except RecursionError:
        raise DataError(f"{place} is nested too deeply to be a record") from None


def _record(values: object, place: str) -> Record:
    if not isinstance(values, dict):
        raise DataError(f"{place} is not a JSON object but {type(values).__name__}: expected fields by name")
    return Record(values, place)
