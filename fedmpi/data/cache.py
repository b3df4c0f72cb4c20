"""Tokenised rows on disk, found by the hash of all that they depend on. It must never know clients or a model.

Many ranks may begin at once on one file system: each that finds nothing makes its own file beside the place and renames it
there. The content is the same whoever comes last, so no lock is needed, and what has a name is whole.
"""

import os
import secrets
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedmpi.data import Config, prompts
from fedmpi.data.corpora import Row
from fedmpi.data.prompts import IGNORED, Counts, Example
from fedmpi.errors import ConfigError, DataError

FORMAT = 1  # part of the key: raise it when what is kept, or how rows become tokens, changes
COUNTS = ("rows", "cut", "dropped", "tokens", "cut_responses")


def tokenize(rows: Sequence[Row], tokenizer: Any, config: Config) -> tuple[list[Example], Counts]:
    """Token ids and labels of each row, from `data.cache` where they are there already."""
    if config.cache is None:
        return prompts.tokenize(rows, tokenizer, config)
    path = Path(config.cache).expanduser() / f"{key(rows, tokenizer, config)}.safetensors"
    if path.exists():
        return _read(path, rows)
    examples, counts = prompts.tokenize(rows, tokenizer, config)
    _write(path, rows, examples, counts)
    return examples, counts


def key(rows: Sequence[Row], tokenizer: Any, config: Config) -> str:
    """The hash of rows, tokenizer, template and length. Names of rows and paths of files are no part of it."""
    found = sha256(f"{FORMAT} {config.max_length} {prompts.template_hash(config.template, tokenizer)}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"data.cache needs a fast tokenizer, {type(tokenizer).__name__} is none: leave out data.cache")
    found.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {backend.to_str()}".encode())
    for row in rows:
        for text in (row.instruction, row.input, row.output):
            encoded = text.encode()
            found.update(len(encoded).to_bytes(8, "little") + encoded)
    return found.hexdigest()[:40]


def _write(path: Path, rows: Sequence[Row], examples: Sequence[Example], counts: Counts) -> None:
    places = {row.id: place for place, row in enumerate(rows)}
    assert len(places) == len(rows), "rows of one client have names of their own"
    supervised = [sum(label != IGNORED for label in example.labels) for example in examples]
    arrays = {
        "tokens": numpy.fromiter((token for example in examples for token in example.input_ids), dtype=numpy.int32),
        "lengths": numpy.array([len(example.input_ids) for example in examples], dtype=numpy.int32),
        "responses": numpy.array(supervised, dtype=numpy.int32),
        "rows": numpy.array([places[example.id] for example in examples], dtype=numpy.int32),
    }
    told = {name: str(getattr(counts, name)) for name in COUNTS} | {"content": _digest(arrays)}
    beside = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(arrays, beside, metadata=told)
            beside.chmod(0o600)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DataError(f"data.cache {path.parent} cannot be written: {error}; give another folder or leave it out") from None


def _read(path: Path, rows: Sequence[Row]) -> tuple[list[Example], Counts]:
    try:
        with safe_open(path, framework="numpy") as file:
            told = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise DataError(f"data.cache: {path} cannot be read ({error}): delete it, it is made anew") from None
    if told.get("content") != _digest(arrays):
        raise DataError(f"data.cache: {path} is damaged, its content is not what was written: delete it, it is made anew")
    ends = numpy.cumsum(arrays["lengths"])[:-1]
    tokens = [part.tolist() for part in numpy.split(arrays["tokens"], ends)] if len(arrays["lengths"]) else []
    parts = zip(tokens, arrays["responses"].tolist(), arrays["rows"].tolist(), strict=True)
    examples = [Example(ids, [IGNORED] * (len(ids) - num) + ids[len(ids) - num :], rows[place].id) for ids, num, place in parts]
    return examples, Counts(**{name: int(told[name]) for name in COUNTS})


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    found = xxhash.xxh3_128()
    for name in sorted(arrays):
        found.update(name.encode() + numpy.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()
