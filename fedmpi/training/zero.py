"""DeepSpeed's settings for a client: the recipe's, and a user's JSON file that may add to them but not contradict them.

Needs neither torch nor deepspeed, so that a contradiction is found before anything is loaded.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.training import Config, compiling

# Whole sections that would say a second time what the recipe says.
_RECIPES = {
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "gradient_accumulation_dtype": "train.precision",
    "managed_gradient_accumulation": "train.accumulation",
}


def settings(config: Config, num_ranks: int) -> dict[str, Any]:
    """What DeepSpeed is given for a client of so many ranks."""
    given = _read(config.deepspeed) if config.deepspeed else {}
    for section, key in _RECIPES.items():
        if section in given:
            raise ConfigError(f"train.deepspeed {config.deepspeed}: {section} belongs to the recipe: leave it out and use {key}")
    zero = _section(given, "zero_optimization", config)
    stage = config.zero_stage or zero.get("stage", 2)
    if stage not in (1, 2, 3):
        raise ConfigError(f"train.deepspeed {config.deepspeed}: zero_optimization.stage is {stage!r}; allowed is 1, 2 or 3")
    wanted: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (config.batch_size, "train.batch_size"),
        "gradient_accumulation_steps": (config.accumulation, "train.accumulation"),
        "train_batch_size": (config.batch_size * config.accumulation * num_ranks, "train.batch_size * train.accumulation * ranks"),
        "gradient_clipping": (config.clip_norm or 0.0, "train.clip_norm"),
    }
    _agree(given, wanted, config, "")
    _agree(zero, {"stage": (stage, "train.zero_stage")}, config, "zero_optimization.")
    if config.zero_offload:
        offload = _section(zero, "offload_optimizer", config)
        _agree(offload, {"device": ("cpu", "train.zero_offload")}, config, "zero_optimization.offload_optimizer.")
        zero = {**zero, "offload_optimizer": {"device": "cpu", **offload}}
    return {
        **given,
        **{key: value for key, (value, _) in wanted.items()},
        "managed_gradient_accumulation": False,  # the loop knows when a step is complete: an epoch's last may be shorter
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": {**zero, "stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own works on the CPU too, and needs no compiler
    }


def check(config: Config, quantization: str = "none", device: str | None = None, dtype: str | None = None) -> None:
    """Refuse at once what would fail in every turn, on this device and a base in these numbers (None: not known)."""
    if config.precision == "half" and dtype not in (None, "float16", "bfloat16"):
        raise ConfigError(f"train.precision half trains in the base's own type, here {dtype}: give model.dtype float16 or bfloat16")
    if config.optimizer.startswith("paged") and device == "cpu":
        raise ConfigError(f"train.optimizer {config.optimizer} pages between GPU and CPU, here is no GPU: leave paged out")
    if config.compile:
        compiling.check()
    if config.engine != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("train.engine deepspeed: the package is not installed; pip install 'fedmpi[deepspeed]'")
    if config.deepspeed:
        given = _read(config.deepspeed).get("train_batch_size", "auto")
        per_rank = config.batch_size * config.accumulation
        merged = settings(config, num_ranks=given // per_rank if isinstance(given, int) and given % per_rank == 0 else 1)
        if quantization != "none" and merged["zero_optimization"]["stage"] == 3:
            raise ConfigError(
                f"train.deepspeed {config.deepspeed}: zero_optimization.stage 3 shares out the base, which cannot be with "
                f"model.quantization {quantization}: give stage 1 or 2"
            )
    _load()


def _load() -> None:
    """Import it outside a client's world: its functions have torch's default group of the moment as default argument.

    Imported inside, it would hold that world's connections for good, and a member that leaves would look alive to the others.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would find by itself, with a warning
    importlib.import_module("deepspeed")


def _agree(given: Mapping[str, Any], wanted: Mapping[str, tuple[Any, str]], config: Config, where: str) -> None:
    for key, (value, recipes) in wanted.items():
        if given.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"train.deepspeed {config.deepspeed}: {where}{key} is {given[key]!r}, but {recipes} is {value!r}: "
                "change one of them, or write auto in the file"
            )


def _section(given: Mapping[str, Any], key: str, config: Config) -> dict[str, Any]:
    section = given.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"train.deepspeed {config.deepspeed}: {key} is {section!r}, expected an object")
    return section


def _read(path: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.deepspeed {path}: cannot be read as JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"train.deepspeed {path}: expected a JSON object, found {type(given).__name__}")
    return given
