"""JSON and JSONL files, plain or gzipped, as records that know their place. It must never know what a corpus is."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedmpi.errors import DataError

COMPRESSED = ".gz"
KINDS = (".jsonl", ".json")


@dataclass(frozen=True)
class Record:
    """One JSON object and where it stands, in words a user can act on."""

    values: dict[str, object]
    place: str


def find(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the names that lies in the folder, plain before compressed."""
    candidates = (folder / (name + suffix) for name in names for suffix in ("", COMPRESSED))
    return next((path for path in candidates if path.is_file()), None)


def read(path: Path) -> tuple[list[Record], str]:
    """All records of a file and the SHA-256 of its (unpacked) bytes."""
    content = _content(path)
    records = list(_array(path, content) if content.lstrip()[:1] == b"[" else _lines(path, content))
    if not records:
        raise DataError(f"{path} holds no records: expected one JSON object per line, or an array of them")
    return records, hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes:
    if path.name.removesuffix(COMPRESSED).endswith(KINDS) is False:
        raise DataError(f"{path} is neither JSON nor JSONL by its name: expected {', '.join(KINDS)}, plain or with {COMPRESSED}")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == COMPRESSED else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return content.removeprefix(b"\xef\xbb\xbf")


def _lines(path: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{path} line {number}"
            yield _record(_parse(_text(line, place), place), place)


def _array(path: Path, content: bytes) -> Iterator[Record]:
    for number, values in enumerate(_parse(_text(content, str(path)), str(path)), start=1):
        yield _record(values, f"{path} record {number}")


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = place if line == 1 else f"{place} line {line}"
        raise DataError(f"{where} is not UTF-8 (byte {content[error.start]:#04x}): save the file as UTF-8") from None


def _parse(text: str, place: str) -> list[object]:
    try:
        return json.loads(text)  # type: ignore[no-any-return]
    except json.JSONDecodeError as error:
        where = place if "\n" not in text.strip() else f"{place} line {error.lineno}"
        raise DataError(f"{where} is not JSON ({error.msg}, column {error.colno}): mend it or take it out") from None
    except RecursionError:
        raise DataError(f"{place} is nested too deeply to be a record") from None


def _record(values: object, place: str) -> Record:
    if not isinstance(values, dict):
        raise DataError(f"{place} is not a JSON object but {type(values).__name__}: expected fields by name")
    return Record(values, place)
