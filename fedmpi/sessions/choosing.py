"""--codec auto: before the first round, the chain that serves this run's links and ranks best; afterwards, the one it began with.

The choice is measured, so it may differ from machine to machine; what follows from it does not: it stands in config.yaml, in
record.json with its reason and in every checkpoint, a resumed run keeps it, and equal chains give equal bytes. It knows settings,
links and the run folder; never rounds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedmpi import config
from fedmpi.codecs import RAW, choice
from fedmpi.codecs.choice import Cost, Way
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.federation import probe
from fedmpi.federation.post import Post
from fedmpi.record.checkpoint import write_atomically
from fedmpi.round import SERVER, cohort_of, place
from fedmpi.settings.recipe import Recipe


@dataclass(frozen=True)
class Chosen:
    """A chain, and why: nothing where a run goes on with what it began with."""

    chain: str
    reason: str


def codec(recipe: Recipe, num_values: int, num_clients: int, path: Path, post: Post | None) -> Chosen:
    """The same on every rank. All of them call this, before anything else goes over the links."""
    known = _known(recipe, path) if post is None or post.transport.rank == SERVER else ""
    if post is None:
        return Chosen(known, "") if known else _simulated(recipe, num_values)
    if post.transport.rank != SERVER:
        chain = probe.told(post)
        if not chain:
            probe.follow(post)
            chain = probe.told(post)
        return Chosen(chain, "")
    probe.tell(post, known)
    if known:
        return Chosen(known, "")
    found = probe.lead(post, choice.within(recipe.codec_budget))
    placement = place(num_clients, post.transport.size, recipe.ranks_per_client, tuple(map(int, recipe.groups)))
    cohort = cohort_of(recipe.sampling, recipe.clients_per_round, num_clients)
    down, up = replace(found.down, copies=min(cohort, len(placement.leaders))), replace(found.up, copies=cohort)
    chosen = _best(recipe, num_values, found.costs, down, up, "the links as measured")
    probe.tell(post, chosen.chain)
    return chosen


def write(path: Path, settings: Mapping[str, Any], chosen: Chosen) -> None:
    """The choice joins the settings of the run, so that it can be run again, and is kept."""
    write_atomically(path / "config.yaml", config.to_yaml({**settings, "codec_chosen": chosen.chain}))


def same(recipe: Recipe, record: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on from a checkpoint under another chain than it was made with."""
    began = record.get("codec_chosen")
    if began != recipe.codec_chosen:
        raise CheckpointError(
            f"{path} has checkpoints under codec_chosen {began}, its config.yaml leads to {recipe.codec_chosen}: "
            f"give --codec_chosen {began}, or another --run_dir"
        )


def reason(path: Path) -> str:
    """Why the run took what it began with."""
    try:
        return str(json.loads((path / "record.json").read_text(encoding="utf-8"))["codec"]["reason"])
    except (OSError, ValueError, KeyError):
        return ""


def _known(recipe: Recipe, path: Path) -> str:
    """What was chosen before: by this run, or by the one whose config.yaml is run again."""
    try:
        there = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}/config.yaml cannot be read ({error}): restore it, or give another --run_dir") from None
    found = there.get("codec_chosen") if isinstance(there, dict) else None
    if found and recipe.codec_chosen and found != recipe.codec_chosen:
        raise ConfigError(
            f"codec_chosen {recipe.codec_chosen}: the run in {path} began with {found}; leave it out, or give another --run_dir"
        )
    return str(found or recipe.codec_chosen or "")


def _simulated(recipe: Recipe, num_values: int) -> Chosen:
    """Where nothing travels there is nothing to measure: the speed of a link must be told."""
    if recipe.link_mbps is None:
        return Chosen(RAW, "nothing travels in one process, and --link_mbps tells no speed")
    link = Way(0.0, 8e-6 / recipe.link_mbps, 1)
    costs = choice.measure(choice.within(recipe.codec_budget))
    return _best(recipe, num_values, costs, link, link, f"a link of {recipe.link_mbps:g} Mb/s, of which nothing was measured")


def _best(recipe: Recipe, num_values: int, costs: Mapping[str, Cost], down: Way, up: Way, of: str) -> Chosen:
    chain, seconds = choice.best(num_values, costs, down, up)
    told = ", ".join(f"{name} {1e3 * seconds[name]:.3g}" for name in sorted(seconds, key=lambda name: seconds[name]))
    speed = ", ".join(
        f"{1e-6 / way.byte_s:.3g} MB/s {name}" if way.byte_s else f"no limit {name}" for name, way in (("down", down), ("up", up))
    )
    taken = f"ms that {num_values} values take in a round over {of} ({speed}), within codec_budget {recipe.codec_budget:g}"
    return Chosen(chain, f"{taken}: {told}")
