"""One member of one client's inner world, started by test_inner_world.py: meets the others, trains, says what it holds.

Usage: inner_world_member.py FOLDER ROLE RANK SIZE STEPS [SETTINGS]
SETTINGS are further ones of training, as JSON; with LAYERS among them the model is a Llama with LoRA on a bf16 base.
The leader's address, which the federation would carry, is handed over in a file.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from fedmpi.data.prompts import IGNORED, Example
from fedmpi.tensors import digest
from fedmpi.training import Config, Hook, InnerWorld, Step, fit, host, join

TIMEOUT_S = 60.0


class Output(NamedTuple):
    logits: torch.Tensor


class Running(torch.nn.Module):
    """A language model that starts fast: each token sees the mean of those before it. The first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 32).requires_grad_(False)
        self.mix = torch.nn.Linear(64, 48)
        self.head = torch.nn.Linear(48, 50)

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        inside = self.embed(input_ids) * attention_mask[..., None]
        before = inside.cumsum(1) / attention_mask.cumsum(1)[..., None]
        hidden = torch.tanh(self.mix(torch.cat([inside, before], dim=-1)))
        return Output(self.head(hidden[:, logits_to_keep]))

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


def small_model(layers: int = 0) -> torch.nn.Module:
    torch.manual_seed(0)
    if not layers:
        return Running()
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    from small_models import llama, with_lora

    model = with_lora(llama(layers=layers))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
    return model


def rows(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(3, 50, (6 + index % 5,), generator=generator).tolist()
        made.append(Example(ids, [IGNORED] * 3 + ids[3:], f"row{index}"))
    return made


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(role: str, steps: int, batch_size: int, settings: dict[str, object]) -> tuple[torch.nn.Module, dict[str, object]]:
    """Seven rows and two micro-batches a step: an epoch's last batch leaves a member of a group of two without a row."""
    settings = {"steps": steps, "batch_size": batch_size, "accumulation": 2, "optimizer": "sgd", "lr": 0.5} | settings
    model = small_model(settings.pop("LAYERS", 0))
    result = fit(model, rows(7), Config(**settings), seed=len(role), pad_id=0)
    kept = ("loss", "last_loss", "tokens", "supervised", "steps")
    return model, {key: getattr(result, key) for key in kept}


class Break(Hook):
    """A member that raises in its third step; the others are in a collective by then."""

    def before_step(self, step: Step) -> None:
        if step.index == 2:
            raise RuntimeError("this member broke")


def fail_and_go_on(
    world: InnerWorld, role: str, steps: int, settings: dict[str, object]
) -> tuple[torch.nn.Module, dict[str, object]]:
    """Rank 1 raises, rank 0 sees it; both meet again and train the same model, still warm from the failure, to the end."""
    model = small_model()
    start = weights(model)
    config = Config(**{"steps": steps, "batch_size": 1, "optimizer": "sgd", "lr": 0.5} | settings)
    assert world.settle(None) is None
    began = time.monotonic()
    try:
        fit(model, rows(7), config, seed=0, pad_id=0, hooks=[Break()] * world.rank)
        failure = None
    except RuntimeError as error:
        failure = f"{type(error).__name__}: {error}"
    first = world.settle(failure)
    waited = time.monotonic() - began
    model.load_state_dict(start, strict=False)
    result = fit(model, rows(7), config, seed=len(role), pad_id=0)
    said = {"first": first, "generation": world.generation, "in_time": waited < TIMEOUT_S / 2}
    return model, said | {"steps": result.steps, "last_loss": result.last_loss}


def address(folder: Path, role: str, rank: int) -> tuple[str, object]:
    """The leader hosts; the others wait for its address."""
    file = folder / f"{role}.address"
    if rank == 0:
        hosted = host()
        file.with_suffix(".part").write_text(hosted.address)
        file.with_suffix(".part").rename(file)
        return hosted.address, hosted
    deadline = time.monotonic() + TIMEOUT_S
    while not file.exists():
        assert time.monotonic() < deadline, f"no address in {file}"
        time.sleep(0.02)
    return file.read_text(), None


def share(world: InnerWorld, role: str) -> dict[str, object]:
    """What the members hold after their leader shared tensors, bytes, and no bytes."""
    leads = world.rank == 0
    sent = {"b": torch.arange(3, dtype=torch.bfloat16), "a": torch.full((2, 2), float(len(role)))}
    shared = world.share(sent if leads else None)
    text = world.share_bytes(f"from the leader of {role}".encode() if leads else None)
    empty = world.share_bytes(b"" if leads else None)
    return {"shared": digest(shared), "text": text.decode(), "empty": len(empty)}


def main(folder: Path, role: str, rank: int, size: int, steps: int, settings: dict[str, object]) -> None:
    launcher = {key: os.environ[key] for key in LAUNCHER}
    where, hosted = address(folder, role, rank)
    world = join(where, rank, size, 0, TIMEOUT_S, role=role)
    if role.endswith("broken"):
        model, result = fail_and_go_on(world, role, steps, settings)
    else:
        model, result = train(role, steps, 1, settings)
        world.rebuild(1)
    result |= share(world, role) | {"digest": digest(weights(model))}
    world.leave()
    assert launcher == {key: os.environ[key] for key in LAUNCHER}
    torch.save(weights(model), folder / f"{role}.{rank}.weights")
    (folder / f"{role}.{rank}.json").write_text(json.dumps(result))
    del hosted  # the leader's store had to live until here


# Another world's variables, as a launcher would set them: the inner world neither believes nor changes them.
LAUNCHER = {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "7", "MASTER_ADDR": "203.0.113.1", "MASTER_PORT": "1"}

if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[6]) if len(sys.argv) > 6 else {}
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]), {"engine": "ddp"} | given)
