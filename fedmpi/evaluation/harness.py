"""The door to lm-evaluation-harness: its tasks on our model and PEFT folder, as they are. It must never know our tasks."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fedmpi import models
from fedmpi.errors import ConfigError, DataError

INSTALL = "pip install 'fedmpi[eval]'"


def evaluate(
    task: str, model: models.Config, adapter: Path | None, device: str, batch_size: int, rows: int | None
) -> Mapping[str, Any]:
    """What the harness says of one of its tasks."""
    try:
        lm_eval = import_module("lm_eval")
    except ModuleNotFoundError:
        raise ConfigError(f"--task lm_eval:{task} needs lm-evaluation-harness, which is not installed: {INSTALL}") from None
    if adapter is not None:
        require_readable(adapter)
    arguments: dict[str, Any] = {"pretrained": models.base_of(model), "dtype": model.dtype}
    if adapter is not None:
        arguments["peft"] = str(adapter)
    try:
        found = lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=[task], device=device, batch_size=batch_size, limit=rows, log_samples=True
        )
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"lm_eval:{task} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
    return {
        "results": found["results"],
        "versions_of_tasks": found.get("versions"),
        "shots": found.get("n-shot"),
        "records": found.get("samples", {}).get(task, []),
        "lm_eval": getattr(lm_eval, "__version__", None),
    }


def require_readable(adapter: Path) -> None:
    """Refuse what the harness would score wrongly without a word: it finds a text's logits by their place from the front."""
    kind = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    if kind in ("P_TUNING", "PROMPT_TUNING"):
        raise ConfigError(f"lm_eval tasks do not know the virtual tokens of {adapter} ({kind}): take a task of our own")
    if kind is None:
        raise ConfigError(f"{adapter} holds a whole model: give its folder, after python -m fedmpi.export RUN_DIR --merge")
