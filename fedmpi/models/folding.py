"""Folding: products that leave the adapter and become part of the frozen base. It must never know whose products they are.

A base weight is always its original plus the sum of all folds, kept in fp32 and rounded once, so that whoever takes the folds one
by one has the same bytes as whoever takes their sum. For the modules that change this costs a copy of the weight and 4 bytes an
element; here alone a matrix of the size of a weight is formed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fedmpi.errors import ModelError
from fedmpi.tensors import Tensors, num_bytes, save_file

DELTA = "base_delta.safetensors"
VERSION = "version"


@dataclass
class Folds:
    """What has been folded into a process's base. `version` counts the folds; factors come as MODULE/A and MODULE/B."""

    model: Callable[[], Any]  # called when there is something to fold: loading it may take long
    version: int = 0
    sums: Tensors = field(default_factory=dict)  # fp32, out x in, by module
    _originals: Tensors = field(default_factory=dict)
    _recent: list[Tensors] = field(default_factory=list)  # the last folds, while they are smaller than their sum

    def fold(self, factors: Tensors) -> None:
        """Add products to the base, and keep them for those who come after."""
        if not factors:
            return
        self._add(factors)
        self.version += 1
        self._recent.append(factors)
        while self._recent and sum(map(num_bytes, self._recent)) > num_bytes(self.sums):
            del self._recent[0]

    def since(self, version: int) -> Tensors:
        """What a holder of an older version misses: each fold, as factors, or all that there ever was."""
        missed = self.version - version
        said = {VERSION: torch.tensor(self.version)}
        if missed > len(self._recent):
            return {**self.saved(), **said}
        return said | {
            f"{number}/{name}": tensor for number, fold in enumerate(self._recent[-missed:]) for name, tensor in fold.items()
        }

    def catch_up(self, missed: Tensors) -> None:
        """Take what `since` gave."""
        if any(name.startswith("sum/") for name in missed):
            return self.restore(missed)
        steps = sorted({name.partition("/")[0] for name in missed} - {VERSION}, key=int)
        for step in steps:
            self._add({name.partition("/")[2]: tensor for name, tensor in missed.items() if name.startswith(f"{step}/")})
        self.version = int(missed[VERSION])

    def most_bytes(self) -> int:
        """What `since` never exceeds by more than a few numbers: the fp32 weights of all modules that have an adapter."""
        layers: list[Any] = [layer for layer in self.model().modules() if hasattr(layer, "lora_A")]
        return sum(4 * layer.get_base_layer().weight.numel() for layer in layers)

    def saved(self) -> Tensors:
        """The state as tensors; nothing where nothing was ever folded."""
        if not self.version:
            return {}
        return {VERSION: torch.tensor(self.version), **{f"sum/{module}": tensor for module, tensor in self.sums.items()}}

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Take up what `saved` gave; nothing means the base as it was loaded."""
        for module in self._originals:
            self._write(module, torch.zeros(()))
        self.sums = {name.removeprefix("sum/"): tensor.clone() for name, tensor in saved.items() if name.startswith("sum/")}
        self.version, self._recent = int(saved[VERSION]) if saved else 0, []
        for module, total in self.sums.items():
            self._write(module, total)

    def _add(self, factors: Tensors) -> None:
        for module in sorted({name.rpartition("/")[0] for name in factors}):
            a, b = (factors[f"{module}/{factor}"].double() for factor in "AB")
            product = (b @ a).mul_(_scaling(self.model(), module))
            self.sums[module] = product.add_(self.sums[module]).float() if module in self.sums else product.float()
            self._write(module, self.sums[module])

    @torch.no_grad()
    def _write(self, module: str, total: torch.Tensor) -> None:
        layer: Any = self.model().get_submodule(module)
        weight = layer.get_base_layer().weight
        if module not in self._originals:
            self._originals[module] = weight.detach().clone()
        change = (total.T if layer.fan_in_fan_out else total).to(weight.device)
        weight.copy_(self._originals[module].float() + change)

    def save(self, folder: Path) -> None:
        """Write the change beside an adapter, by the names and in the layout of the model's own weights."""
        change: Tensors = {}
        for module, total in sorted(self.sums.items()):
            layer: Any = self.model().get_submodule(module)
            change[f"{module.removeprefix('base_model.model.')}.weight"] = total.T if layer.fan_in_fan_out else total
        if change:
            save_file(change, folder / DELTA, metadata={"format": "pt"})


def _scaling(model: Any, module: str) -> float:
    layer: Any = model.get_submodule(module)
    return float(next(iter(layer.scaling.values())))


def names_of_changes(folder: Path) -> set[str]:
    """The weights of the model that a run's folder says were changed."""
    if not (folder / DELTA).is_file():
        return set()
    with safe_open(folder / DELTA, "pt") as file:
        return set(file.keys())


@torch.no_grad()
def fold_in(model: torch.nn.Module, folder: Path) -> None:
    """Add to a bare model's weights what a run's folder says was folded into them."""
    for name in sorted(names_of_changes(folder)):
        with safe_open(folder / DELTA, "pt") as file:
            change = file.get_tensor(name)
        try:
            weight = model.get_parameter(name)
            weight.copy_(weight.float() + change.to(weight.device))
        except (AttributeError, RuntimeError) as error:
            raise ModelError(f"{folder / DELTA} does not fit the model: {name}: {error}") from None
