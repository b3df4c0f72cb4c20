"""Files of rows: which of a folder are meant, unpacked by their ending, read by their kind. It must never know a corpus."""

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedmpi.data import records, tables
from fedmpi.data.records import Record
from fedmpi.errors import DataError

UNPACK: Mapping[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
READERS: Mapping[str, Callable[[Path, bytes], Iterator[Record]]] = {
    ".jsonl": records.parse,
    ".json": records.parse,
    ".csv": tables.parse_csv,
    ".parquet": tables.parse_parquet,
}


def find(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the first name that lies in the folder, plain before compressed; wildcards may find several."""
    for name in names:
        for suffix in ("", *UNPACK):
            if found := sorted(path for path in folder.glob(name + suffix) if path.is_file()):
                return found
    return []


def kind(path: Path) -> str:
    """The ending that says how a file is read, without that of its compression."""
    name = path.name.removesuffix(path.suffix) if path.suffix in UNPACK else path.name
    return Path(name).suffix


def read(path: Path) -> tuple[list[Record], str]:
    """All records of a file and the SHA-256 of its (unpacked) bytes."""
    if kind(path) not in READERS:
        raise DataError(
            f"{path} is no file of rows by its name: expected {', '.join(READERS)}, plain or with {', '.join(UNPACK)} after it"
        )
    content = _content(path)
    found = list(READERS[kind(path)](path, content))
    if not found:
        raise DataError(f"{path} holds no records: expected rows with fields by name")
    return found, hashlib.sha256(content).hexdigest()


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content = UNPACK[path.suffix](content) if path.suffix in UNPACK else content
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return content.removeprefix(b"\xef\xbb\xbf")
