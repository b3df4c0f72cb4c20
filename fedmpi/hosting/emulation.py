"""What clients of offsite tuning train on instead of the model: made and aligned by the server, stored, handed out, taken over.

A client's part of this never opens the model folder: whatever it holds came over the link.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi import data, models, offsite
from fedmpi.errors import CheckpointError, ConfigError, ModelError, Stopped
from fedmpi.hosting import public_rows
from fedmpi.hosting.base import Base, Given
from fedmpi.hosting.host import Original, Split
from fedmpi.models import skeleton
from fedmpi.offsite.account import account
from fedmpi.offsite.builders import NEEDS_TEXT
from fedmpi.offsite.structure import Structure, reshape
from fedmpi.record.checkpoint import file_sha256, sync
from fedmpi.record.folder import read_object
from fedmpi.round import SERVER, place
from fedmpi.seeding import seed_for
from fedmpi.settings.recipe import Recipe
from fedmpi.tensors import num_bytes
from fedmpi.training.hooks import Hook, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedmpi.federation.post import Post
    from fedmpi.federation.supply import Supply

FOLDER, ABOUT, WEIGHTS = "emulator", "emulation.json", "model.safetensors"
TOLD_EVERY = 50  # steps of the pre-alignment
MEASURED_BATCHES = 4  # of public text, on which the distance to the model is taken
GAPS = (
    ("before", "hidden states off by", "relative"),
    ("after", "aligned", "relative"),
    ("before", "KL", "kd"),
    ("after", "aligned", "kd"),
)


@dataclass(frozen=True)
class Emulation:
    """The emulator with the adapter's layers, as a bare model; `structure` is what its configuration does not say."""

    given: Given
    layout: offsite.Layout
    structure: Mapping[str, Any]

    def base(self, wanted: Recipe, scheme: offsite.Scheme, device: str) -> Base:
        """The model with fresh tensors to train on it: on the adapter's layers, and on the emulator's where rounds tune it."""
        layers = None if scheme.tunes_emulator else places(self.layout, "adapter")
        return Base(wanted.model, wanted.peft, device, wanted.seed, self.given, layers, self.layout)


def places(layout: offsite.Layout, part: str) -> tuple[int, ...]:
    """Where the layers of a part stand in the compressed model."""
    chosen = getattr(layout, part)
    return tuple(place for place, number in enumerate(layout.order) if number in chosen)


@dataclass(frozen=True)
class Heedful(Hook):
    """A training that is no client's turn, and may be long: says how far it is, and ends as soon as somebody is told to stop."""

    halt: Callable[[], bool]

    def after_step(self, step: Step) -> None:
        """After each step, since there may be hundreds."""
        done, of = step.index + 1, step.num_steps
        if self.halt():
            raise Stopped(f"after step {done} of {of} of the pre-alignment, which begins anew")
        if done % TOLD_EVERY == 0 and done < of:
            print(f"fedmpi: pre-alignment, step {done} of {of}", flush=True)


def outfit(
    wanted: Recipe,
    scheme: offsite.Scheme,
    device: str,
    folder: Path,
    parties: data.Federated,
    post: "Post | None",
    experiment: str,
    halt: Callable[[], bool] = lambda: False,
) -> tuple[Base, Split, Original | None, int]:
    """This rank's model to train on and how it was split; on the server the original, and the bytes that were handed out."""
    from fedmpi.federation import supply

    if post is not None and post.transport.rank != SERVER:
        made = on_client(supply.take_over(post, experiment), device)
        return made.base(wanted, scheme, device), Split(scheme.resolve(wanted.offsite), made.layout), None, 0
    try:
        made, original = on_server(wanted, scheme, device, folder, parties, halt)
    except Stopped as stopped:
        if post is not None:
            supply.call_off(post, str(stopped))
        raise
    clients, given = len(parties.clients), original.supply()
    if post is None:  # what a federation's links would carry
        sent = clients * (num_bytes(dict(skeleton.stored(made.given.model))) + sum(map(len, given.files.values())))
    else:
        placement = place(clients, post.transport.size, wanted.ranks_per_client, tuple(map(int, wanted.groups)))
        sent = supply.hand_out(post, experiment, given, [peer for peer in post.transport.peers if placement.hosted_by(peer)])
    return made.base(wanted, scheme, device), Split(scheme.resolve(wanted.offsite), made.layout), original, sent


def on_server(
    wanted: Recipe, scheme: offsite.Scheme, device: str, folder: Path, parties: data.Federated, halt: Callable[[], bool]
) -> tuple[Emulation, Original]:
    """Make the emulator, or open the one that a former start of this run has made; the original model stays here."""
    config = scheme.resolve(wanted.offsite)
    own = folder / FOLDER
    there = own if (own / ABOUT).exists() else config.emulator and Path(config.emulator).expanduser()
    if not there and halt():
        raise Stopped("before the emulator was made")
    tokenizer, model = models.load_tokenizer(wanted.model), models.load_model(wanted.model, device)
    examples = cache(lambda: public_rows.examples(wanted, config, tokenizer, parties))
    if there:
        emulator = reopen(there, model, config)
    else:
        looks = config.builder in NEEDS_TEXT
        emulator = offsite.build(model, config, _some(examples(), config, tokenizer.pad_token_id) if looks else ())
    layout = emulator.layout
    bare = offsite.assemble(model, tuple(range(layout.num_layers)))  # `full` puts its adapter into the model itself
    full = Base(wanted.model, wanted.peft, device, wanted.seed, Given(model, tokenizer), layout.adapter)

    @cache
    def goal() -> offsite.Goal:
        seed = seed_for(wanted.seed, "public")
        return offsite.goal(full.model, layout, examples(), config, seed=seed, pad_id=full.pad_id, folder=folder)

    gaps: dict[str, Any] = {}
    if not there and config.prealign_steps:
        emulator, gaps = _aligned(emulator, goal(), config, wanted, halt)
    structure = emulator.structure  # what is folded into factors makes them grow
    report = (read_object(there / ABOUT) or {}).get("report", {}) if there else {**account(bare, emulator).shares(), **gaps}
    if not there:
        print(f"fedmpi: emulator of {len(layout.emulator)} layers for {len(layout.inner)}: {_told(report)}", flush=True)
    if there != own:
        store(emulator, structure, report, tokenizer, own)
    return Emulation(Given(emulator.model, tokenizer), layout, structure), Original(full, goal, partial(stored_supply, own), report)


def stored_supply(folder: Path) -> "Supply":
    """What goes over the links: what is in an emulator's folder."""
    from fedmpi.federation.supply import FILES, Supply

    try:
        about, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (ABOUT, "config.json"))
        facts = {"config": skeleton.nowhere(settings), "layout": about["layout"], "structure": about["structure"]}
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}
        found = file_sha256(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the emulator in {folder} can be given to nobody: {error!r}") from None
    if found != about["sha256"]:
        raise CheckpointError(f"{folder / WEIGHTS} should have SHA-256 {about['sha256'][:12]}, found {found[:12]}")
    return Supply(facts, files, _tensors(folder / WEIGHTS))


def on_client(supply: "Supply", device: str) -> Emulation:
    """The emulator from what came over the link; a rank without clients has its tokenizer alone."""
    facts = supply.facts
    layout = _layout(facts["layout"])
    model = skeleton.empty(facts["config"])
    reshape(model, facts["structure"])
    for name, tensor in supply.tensors:
        skeleton.put(model, name, tensor.to(device))
    if supply.tensors:
        skeleton.whole(model, device)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in supply.files.items():
            (Path(folder) / name).write_bytes(content)
        (Path(folder) / "config.json").write_text(json.dumps(facts["config"]), encoding="utf-8")
        tokenizer = models.load_tokenizer(models.Config(folder))
    return Emulation(Given(model, tokenizer), layout, facts["structure"])


def _aligned(
    emulator: offsite.Emulator, goal: offsite.Goal, config: offsite.Config, wanted: Recipe, halt: Callable[[], bool]
) -> tuple[offsite.Emulator, dict[str, Any]]:
    """Steps of alignment before the first round, merged: what clients get are no longer layers of the original. With how far the
    emulator was from the model, and is."""
    size, layout, seed = config.align_batch_size, emulator.layout, seed_for(wanted.seed, "prealign")
    few = replace(goal, examples=goal.examples[: MEASURED_BATCHES * size])
    before = offsite.distance(few, emulator.model, layout, size)
    emulator, done = offsite.prealign(emulator, goal, config, wanted.train, wanted.peft, seed=seed, hooks=[Heedful(halt)])
    after = offsite.distance(few, emulator.model, layout, size)
    return emulator, {"before": before, "after": after, **done.figures}


def _told(report: Mapping[str, Any]) -> str:
    """What an emulator saves, gives away and is worth, in a line."""
    shares = "{bytes:.0%} of their bytes, {flops_per_token:.0%} of their FLOPs, {disclosed:.0%} of the model's weights disclosed"
    gaps = [f"{name} {report[when][key]:.3g}" for when, name, key in GAPS if when in report]
    return "; ".join([shares.format(**report), *([", ".join(gaps)] if gaps else [])])


def _some(examples: "Sequence[data.Example]", config: offsite.Config, pad_id: int) -> "list[data.Batch]":
    """What a builder looks at: the first of the public rows, which stand in no order of difficulty."""
    size = config.align_batch_size
    return [data.collate(examples[start : start + size], pad_id) for start in range(0, min(16 * size, len(examples)), size)]


def store(
    emulator: offsite.Emulator, structure: Mapping[str, Any], report: Mapping[str, Any], tokenizer: Any, folder: Path
) -> None:
    """A model folder that transformers opens, whole or not there."""
    from fedmpi.tensors import save_file

    beside = folder.with_name(f".{folder.name}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        emulator.model.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        save_file(dict(skeleton.stored(emulator.model)), beside / WEIGHTS, metadata={"format": "pt"})
        sha256 = file_sha256(beside / WEIGHTS)
        about = {"layout": asdict(emulator.layout), "structure": structure, "sha256": sha256, "report": report}
        (beside / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for path in (*beside.iterdir(), beside):
            sync(path)
        os.rename(beside, folder)
        sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"the emulator {folder} could not be written ({error}): make room and start again") from error


def reopen(folder: Path, model: "PreTrainedModel", config: offsite.Config) -> offsite.Emulator:
    """The emulator of a folder, sharing with the model everything that is equal in both."""

    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        layout, sha256 = _layout(about["layout"]), about["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} holds no emulator that can be used ({error!r}): give a RUN_DIR/emulator, or none"
        ) from None
    path, layers = offsite.find_layers(model)
    asked = offsite.Layout(path, len(layers), config.adapter_first or 0, config.adapter_last or 0, layout.emulator)
    if layout != asked:
        raise ConfigError(
            f"the emulator in {folder} is of another model or of other adapters: it says {_split(layout)}, "
            f"and these settings {_split(asked)}"
        )
    emulator = offsite.Emulator(offsite.assemble(model, layout.order), layout)
    reshape(emulator.model, about["structure"])
    if (found := file_sha256(folder / WEIGHTS)) != sha256:
        raise CheckpointError(f"{folder / WEIGHTS} should have SHA-256 {sha256[:12]}, found {found[:12]}: remove {folder}")
    ours = dict(skeleton.stored(emulator.model))
    for name, tensor in _tensors(folder / WEIGHTS):
        alike = name in ours and ours[name].shape == tensor.shape and not ours[name].is_meta
        if alike and bool((ours[name] == tensor.to(ours[name])).all()):
            continue
        if emulator.layout.part(emulator.layout.original(name)) != "emulator":
            raise ModelError(f"the emulator in {folder} is of another model: {name} differs; give the folder of the right one")
        skeleton.put(emulator.model, name, tensor.to(model.device))
    return replace(emulator, model=skeleton.whole(emulator.model, model.device))


def open_model(config: models.Config, device: str) -> "PreTrainedModel":
    """A model to be asked, as `models.load_model` gives it; an emulator of any builder too, though transformers knows not all."""
    wanted = structure_of(config)
    if not wanted:
        return models.load_model(config, device)
    folder, dtype = Path(config.path), models.dtype_of(config, device)
    model = skeleton.empty(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    reshape(model, wanted)
    for name, tensor in _tensors(folder / WEIGHTS):
        skeleton.put(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    model.name_or_path = models.public_name(config)
    return skeleton.whole(model, device)


def structure_of(config: models.Config) -> Structure:
    """What the configuration of an emulator in a folder does not say; nothing where it says all, or is no emulator's."""
    about = read_object(Path(config.path) / ABOUT) or {}
    found: Structure = about.get("structure", {})
    return found


def _layout(said: Mapping[str, Any]) -> offsite.Layout:
    return offsite.Layout(**{**said, "emulator": tuple(said["emulator"])})


def _split(layout: offsite.Layout) -> str:
    return f"{layout.num_layers} layers at {layout.path}, adapters of {layout.first} and {layout.last}"


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a file, one at a time."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            yield name, file.get_tensor(name)
