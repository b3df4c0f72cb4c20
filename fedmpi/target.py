"""Who is evaluated: a run folder or a model, as a base and an adapter and how its data were made. It must never load weights."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmpi import data, models
from fedmpi.errors import ConfigError
from fedmpi.settings import recipe


@dataclass(frozen=True)
class Target:
    """Who is scored: the base, the adapter on it if any, and how its data were made."""

    model: models.Config
    adapter: Path | None
    data: data.Config
    clients: int | None
    seed: int
    out: Path

    def facts(self, device: str) -> dict[str, Any]:
        """For the record: never a path of this machine."""
        from fedmpi.record.checkpoint import file_sha256

        adapter = None if self.adapter is None else file_sha256(self.adapter / "adapter_model.safetensors")
        dtype = str(models.dtype_of(self.model, device)).removeprefix("torch.")
        return {"model": models.public_name(self.model), "dtype": dtype, "adapter_sha256": adapter}


def open_target(path: str, out: Path | None, which: str | None = None) -> Target:
    """A run folder is known by its config.yaml; everything else is a model."""
    folder = Path(path)
    if (folder / "config.yaml").is_file():
        return _emulated(folder, out) if which == "emu" else _trained(folder, out, which)
    if which is not None:
        raise ConfigError(f"--which {which}: {path} is no run folder; it chooses between the two models of a run of offsite tuning")
    model = models.Config(path)
    name = models.public_name(model).replace("/", "_").replace(":", "_")
    return Target(model, None, data.Config(), None, 0, out or Path("evaluations") / name)


def _trained(folder: Path, out: Path | None, which: str | None) -> Target:
    """What a run trained, on the model that it began with."""
    wanted, adapter = recipe.of_run(folder), folder / "adapter"
    if which is not None:
        _require_emulator(folder, which)
    parts = sorted(path.parent for path in folder.glob("clients/*/adapter"))
    if parts and not adapter.is_dir():
        raise ConfigError(f"{folder} holds {len(parts)} clients trained alone: give one of them, such as {parts[0]}")
    _require_finished(adapter)
    return Target(wanted.model, adapter, wanted.data, wanted.clients, wanted.seed, out or folder / "evaluations")


def _emulated(folder: Path, out: Path | None) -> Target:
    """What the clients of offsite tuning have: the adapter that goes with the emulator."""
    wanted, adapter = recipe.of_run(folder), folder / "adapter_emu"
    _require_emulator(folder, "emu")
    _require_finished(adapter)
    base = replace(wanted.model, path=str(folder / "emulator"))
    return Target(base, adapter, wanted.data, wanted.clients, wanted.seed, out or folder / "evaluations" / "emu")


def _require_emulator(folder: Path, which: str) -> None:
    if not (folder / "emulator").is_dir():
        raise ConfigError(f"--which {which}: {folder} is no run of offsite tuning (it has no emulator/)")


def _require_finished(adapter: Path) -> None:
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"{adapter.parent} has no {adapter.name}/ yet: the run has not finished (see state.json); go on with it first"
        )


def default_task(name: str) -> str:
    """What a data set is scored with, where a user names no task."""
    fixed = data.FEDERATED.get(name)
    known = {"gsm8k": "gsm8k", "builtin:toy": "exact_match"}
    return fixed.task if fixed else known.get(name, "perplexity")
