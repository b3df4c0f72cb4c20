"""The frozen model with its one adapter slot and its tokenizer, loaded on first use. It must never know rows, ranks or rounds."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi import models
from fedmpi.seeding import seed_for
from fedmpi.tensors import Tensors, copies

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedmpi.offsite import Layout


@dataclass(frozen=True)
class Given:
    """A backbone and its tokenizer that were not read from a folder here."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


@dataclass
class Base:
    """The frozen model and its tokenizer, loaded once, with the tensors on it that are trained.

    An emulator's layers are numbered anew; outside, its tensors go by their names on the original model, which `layout` knows.
    """

    config: models.Config
    peft: models.PeftConfig
    device: str
    seed: int
    given: "Given | None" = None  # in the place of what config names
    layers: tuple[int, ...] | None = None  # that get an adapter, as they are numbered in this model; default all
    layout: "Layout | None" = None  # where this is an adapter with an emulator

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The backbone's own tokenizer."""
        return self.given.tokenizer if self.given else models.load_tokenizer(self.config)

    @property
    def model(self) -> "PreTrainedModel | PeftModel":
        """The backbone with the adapter on it. Hosted clients take turns on it: each loads its own values first."""
        return self._loaded[0]

    @property
    def fresh(self) -> Tensors:
        """The adapter as it begins, whatever has been loaded into the model since."""
        return self._loaded[1]

    @property
    def trained(self) -> "dict[str, Parameter]":
        """What is trained at any time, by its name in this model: found once, for a model has many modules to be walked."""
        return self._loaded[3]

    def part(self, tensors: Tensors, part: str) -> Tensors:
        """Those of the tensors that belong to adapter or emulator."""
        assert self.layout is not None
        return {name: tensor for name, tensor in tensors.items() if self.layout.part(name) == part}

    def load(self, tensors: Tensors) -> None:
        """Write values into everything that is trained at any time, whether it moves now or not."""
        models.write(self.trained, {self._inside.get(name, name): tensor for name, tensor in tensors.items()})

    def take(self, part: str | None = None) -> Tensors:
        """Copies of what is trained, or of one part of it, ready to be sent."""
        names = sorted(self.fresh if part is None else self.part(self.fresh, part))
        taken = copies({inside: self.trained[inside] for inside in map(self._inside.__getitem__, names)})
        return dict(zip(names, taken.values(), strict=True))

    def wearing(self, adapter: Tensors | None) -> Any:
        """The model with an adapter's values; without one the backbone, since fresh virtual tokens are not nothing."""
        self.load(self.fresh if adapter is None else adapter)
        return models.bare(self.model) if adapter is None else self.model

    def save(self, tensors: Tensors, folder: Path) -> None:
        """Write the adapter's folder, which fits this model."""
        models.save_adapter(self.model, {self._inside[name]: tensor for name, tensor in tensors.items()}, folder)

    def tune(self, part: str) -> None:
        """From now on let this part move, and nothing else."""
        moving = self.part(self.fresh, part)
        for name, inside in self._inside.items():
            self.trained[inside].requires_grad_(name in moving)
        models.drop_where_trained(self.model, self.peft.dropout)

    @property
    def _inside(self) -> dict[str, str]:
        """The name in this model of each trained tensor."""
        return self._loaded[2]

    @cached_property
    def folds(self) -> "models.Folds":
        """What rounds have folded into this base."""
        return models.Folds(lambda: self.model)

    def anew(self, *when: int) -> Tensors:
        """Another adapter that begins as nothing."""
        models.load_trainable(self.model, self.fresh)
        models.initialise(self.model, self.peft, seed_for(self.seed, "anew", *when), None)
        return models.trainable(self.model)

    @cached_property
    def _loaded(self) -> "tuple[PreTrainedModel | PeftModel, Tensors, dict[str, str], dict[str, Parameter]]":
        backbone = self.given.model if self.given else models.load_model(self.config, self.device)
        tokenizer = self.tokenizer if self.peft.init_text else None
        model = models.add_adapter(backbone, self.peft, self.seed, tokenizer, self.layers)
        trained = models.trained(model)
        values = copies(trained)
        names = {self.layout.original(name) if self.layout else name: name for name in values}
        return model, {name: values[inside] for name, inside in names.items()}, names, trained

    @property
    def pad_id(self) -> int:
        """What fills batches up; masks come from lengths, so end-of-text will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)
