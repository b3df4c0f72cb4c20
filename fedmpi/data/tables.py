"""CSV, Parquet and the hub's data sets as records that know their place. It must never know what a corpus is."""

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmpi.data.records import Record, text
from fedmpi.errors import ConfigError, DataError, Unreachable

FIELD_LIMIT = 1 << 30  # characters of one CSV field; Python's own limit is too small for programs as text


def parse_csv(path: Path, content: bytes) -> Iterator[Record]:
    """Rows below a first line that names the fields; a quoted field may hold commas and line ends."""
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text(content, str(path)), newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path} line 1 names a field twice: {', '.join(names)}")
        for values in reader:
            if not values:
                continue  # an empty line
            if len(values) != len(names):
                raise DataError(f"{path} line {reader.line_num} has {len(values)} fields: the first line names {len(names)}")
            yield Record(dict(zip(names, values, strict=True)), f"{path} line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is not CSV ({error}): mend it or take it out") from None


def parse_parquet(path: Path, content: bytes) -> Iterator[Record]:
    """All rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} is Parquet, which needs pyarrow: pip install 'fedmpi[data]', or give JSONL or CSV") from None
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {' '.join(str(error).split())[:200]}") from None
    yield from (Record(values, f"{path} record {number}") for number, values in enumerate(rows, start=1))


def from_hub(name: str, subset: str | None, split: str, tell: Callable[[bytes], None]) -> Iterator[Record]:
    """All rows of one split of a data set on the hub, each also told as bytes. Nothing that came with the data is run."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{name} on the hub needs datasets: pip install 'fedmpi[data]', or give data.path") from None
    try:
        with _quiet("huggingface_hub", "datasets"):  # their retries are told in our one line
            found = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001  (datasets lets through what http clients, file systems and formats raise)
        reason = " ".join(str(error).split())[:200]
        raise Unreachable(f"{name} cannot be had from the hub ({type(error).__name__}: {reason}): give data.path") from None
    for number, values in enumerate(found, start=1):
        tell(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
        yield Record(dict(values), f"{name} {split} record {number}")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Only errors of these packages' own logs."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
