"""The door to lm-evaluation-harness: its tasks on our model and PEFT folder, as they are. It must never know our tasks."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedmpi import models
from fedmpi.errors import ConfigError, EvaluationError
from fedmpi.models.folding import names_of_changes

INSTALL = "pip install 'fedmpi[eval]'"


def evaluate(
    task: str, folder: str | None, model: models.Config, adapter: Path | None, device: str, batch_size: int, rows: int | None
) -> Mapping[str, Any]:
    """What the harness says of one of its tasks, or of a user's own whose YAML file lies in a folder."""
    try:
        lm_eval, tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ModuleNotFoundError:
        raise ConfigError(f"--task lm_eval:{task} needs lm-evaluation-harness, which is not installed: {INSTALL}") from None
    require_readable(model, adapter)
    arguments: dict[str, Any] = {"pretrained": models.base_of(model), "dtype": models.dtype_of(model, device)}
    if adapter is not None:
        arguments["peft"] = str(adapter)
    own = {"device": device, "batch_size": batch_size, "limit": rows, "log_samples": True}
    try:
        known = tasks.TaskManager(include_path=folder)
        found = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=[task], task_manager=known, **own)
    except (KeyError, ValueError, OSError) as error:
        raise EvaluationError(f"lm_eval:{task} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
    return {
        "results": found["results"],
        "versions_of_tasks": found.get("versions"),
        "shots": found.get("n-shot"),
        "records": found.get("samples", {}),
        "lm_eval": getattr(lm_eval, "__version__", None),
    }


def require_readable(model: models.Config, adapter: Path | None) -> None:
    """Refuse what the harness would score wrongly without a word."""
    if model.quantization != "none":
        raise ConfigError(f"lm_eval tasks load the model as it is, not in {model.quantization}: take a task of our own")
    if adapter is None:
        return
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    if kind in ("P_TUNING", "PROMPT_TUNING"):  # the harness finds a text's logits by their place from the front
        raise ConfigError(f"lm_eval tasks do not know the virtual tokens of {adapter} ({kind}): take a task of our own")
    if kind is None or names_of_changes(adapter):
        raise ConfigError(
            f"{adapter} changes the model itself: give the model's folder, after python -m fedmpi.export RUN_DIR --merge"
        )
