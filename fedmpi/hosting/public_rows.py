"""The public rows that the server of offsite tuning aligns on. They must never be the clients'."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmpi import data, offsite
from fedmpi.data.corpora import declaration
from fedmpi.errors import ConfigError, DataError
from fedmpi.settings.recipe import Recipe

TOY_SEED = 1  # builtin:toy as a public set: problems of the same world, other ones than the clients'
TOY_ROWS = 4096


def examples(wanted: Recipe, config: offsite.Config, tokenizer: Any, parties: data.Federated) -> "list[data.Example]":
    """The rows that the server aligns on: its own, and nobody's secret."""
    from fedmpi.data import toy

    if config.public_name == "builtin:toy":
        rows = [data.Row(**values, id=f"public:{i}") for i, values in enumerate(toy.rows(TOY_ROWS, TOY_SEED, "train"))]
    else:
        _refuse_clients_files(wanted, config)
        corpus = data.load(
            replace(wanted.data, name=config.public_name, path=config.public_path, fields={}, num_rows=None), wanted.seed
        )
        used = _digests(parties.record)
        if shared := used & {str(facts.get("sha256")) for facts in corpus.files.values()}:
            raise DataError(f"offsite.public_path {config.public_path} is a file of the clients (SHA-256 {min(shared)[:12]})")
        rows = corpus.train
    found, counts = data.tokenize(rows, tokenizer, wanted.data)
    if not found:
        raise DataError(f"offsite.public_name {config.public_name}: none of {len(rows)} rows has a token to align on ({counts})")
    return found


def _refuse_clients_files(wanted: Recipe, config: offsite.Config) -> None:
    """Public rows that are the clients' own would be aligned on what the server must not have."""
    same = declaration(wanted.data.name) is declaration(config.public_name)
    if same and wanted.data.path is None and config.public_path is None:
        raise ConfigError(f"offsite.public_name {config.public_name} is the clients' corpus: give another one")
    if wanted.data.path is None or config.public_path is None:
        return
    public = Path(config.public_path).expanduser().resolve()
    for client in range(wanted.clients or 1):
        theirs = Path(wanted.data.path.replace("{client}", str(client))).expanduser().resolve()
        if public == theirs or theirs in public.parents or (theirs.is_file() and public in theirs.parents):
            raise ConfigError(f"offsite.public_path {config.public_path} lies in the clients' files ({theirs}): give another one")


def _digests(record: Any) -> set[str]:
    """Every SHA-256 that stands somewhere in a record of data."""
    if isinstance(record, Mapping):
        own = {str(record["sha256"])} if isinstance(record.get("sha256"), str) else set()
        return own.union(*map(_digests, record.values()))
    return set().union(*map(_digests, record)) if isinstance(record, list | tuple) else set()
