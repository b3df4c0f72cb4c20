"""What a PEFT method adds to a backbone, and how it begins. It must never know who trains it, or on what.

Where a method begins depends on the seed and on the names of its parameters, not on the order of modules or the device.
"""

import inspect
from collections.abc import Collection
from itertools import cycle, islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmpi.errors import ModelError
from fedmpi.models import PeftConfig
from fedmpi.models.library import peft
from fedmpi.models.targets import ALL_LINEAR, all_conv1d, find_targets, inside
from fedmpi.seeding import seed_for

DEFAULT_RANGE = 0.02  # the spread of fresh embeddings where a model does not state its own


def require_place(model: PreTrainedModel, method: str) -> None:
    """Refuse a model without the place where a method puts its virtual tokens."""
    place = {"prefix": "past_key_values", "ptuning": "inputs_embeds", "prompt": "inputs_embeds"}.get(method)
    if place and place not in inspect.signature(type(model).forward).parameters:
        raise ModelError(
            f"{type(model).__name__} cannot take peft.method {method}: its forward has no {place}; take lora, or another model"
        )


def describe(model: PreTrainedModel, wanted: PeftConfig, layers: Collection[int] | None = None) -> peft.PeftConfig:
    """The method in peft's own words. Nothing in it names a file: a prompt's text becomes values in `initialise`."""
    match wanted.method:
        case "lora":
            return _lora(model, wanted, layers)
        case "prefix":
            projected = wanted.encoder == "mlp"
            return peft.PrefixTuningConfig(**_virtual(wanted), prefix_projection=projected, encoder_hidden_size=_width(model))
        case "ptuning":
            kind = (wanted.encoder or "mlp").upper()
            return peft.PromptEncoderConfig(
                **_virtual(wanted),
                token_dim=_width(model),
                encoder_reparameterization_type=kind,
                encoder_hidden_size=_width(model),
                encoder_dropout=wanted.dropout,
            )
        case "prompt":
            return peft.PromptTuningConfig(**_virtual(wanted), token_dim=_width(model))
    raise ValueError(f"{wanted.method} adds nothing to a model")


@torch.no_grad()
def initialise(model: peft.PeftModel, wanted: PeftConfig, seed: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the first values. DoRA's magnitudes stay as peft took them from the base: they are no choice of ours."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.is_meta or "lora_magnitude_vector" in name:
            continue
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        _draw(values, model, name, wanted, torch.Generator().manual_seed(seed_for(seed, "adapter", name)))
        parameter.copy_(values)
    if wanted.init_text and not (embedding := model.prompt_encoder[model.active_adapter].embedding.weight).is_meta:
        if tokenizer is None:
            raise ModelError("peft.init_text becomes a prompt through the model's tokenizer: none was given")
        ids = list(islice(cycle(_text_ids(tokenizer, wanted.init_text)), len(embedding)))
        words = model.get_base_model().get_input_embeddings()
        embedding.copy_(words(torch.tensor(ids, device=words.weight.device)))


def _lora(model: PreTrainedModel, wanted: PeftConfig, layers: Collection[int] | None) -> peft.LoraConfig:
    named = tuple(wanted.target_modules)
    targets: str | list[str] = ALL_LINEAR if named == (ALL_LINEAR,) else find_targets(model, named)
    if layers is not None:
        targets = inside(model, targets, layers)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        init_lora_weights="gaussian" if wanted.init == "gaussian" else True,
        use_rslora=wanted.rslora,
        use_dora=wanted.dora,
        target_modules=targets,
        fan_in_fan_out=all_conv1d(model, targets),
    )


def _virtual(wanted: PeftConfig) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "num_virtual_tokens": wanted.num_virtual_tokens}


def _width(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().embedding_dim)


def _draw(values: torch.Tensor, model: peft.PeftModel, name: str, wanted: PeftConfig, generator: torch.Generator) -> None:
    """One parameter's first values, in place."""
    if ".lora_B." in name:
        values.zero_()
    elif ".lora_A." in name and wanted.init == "gaussian":
        values.normal_(0, 1 / wanted.rank, generator=generator)
    elif ".embedding." in name:
        values.normal_(0, _spread(model, wanted), generator=generator)
    else:  # the uniform range of fresh linear layers and LSTMs
        bound = _inputs(model, name, values) ** -0.5
        values.uniform_(-bound, bound, generator=generator)


def _spread(model: peft.PeftModel, wanted: PeftConfig) -> float:
    """Virtual tokens begin like the model's own embeddings began; what an encoder reads, and `gaussian`, is N(0, 1)."""
    if wanted.init == "gaussian" or wanted.method == "ptuning" or wanted.encoder:
        return 1.0
    return float(getattr(model.get_base_model().config, "initializer_range", None) or DEFAULT_RANGE)


def _inputs(model: peft.PeftModel, name: str, values: torch.Tensor) -> int:
    """What a fresh layer's range depends on: an LSTM's hidden size, the inputs of the linear layer that a weight or bias is of."""
    if ".lstm_head." in name:
        return int(model.prompt_encoder[model.active_adapter].lstm_head.hidden_size)
    return int(values.shape[1] if values.ndim > 1 else model.get_parameter(name.removesuffix("bias") + "weight").shape[1])


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text as the tokenizer reads a prompt, its first token included."""
    ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise ModelError(f"peft.init_text {text!r} has no token for this model's tokenizer: give another text")
    return ids
