"""Folds into the base: the same bytes one by one, late, or all at once; undone, saved, and found in the folder again."""

from pathlib import Path

import pytest
import torch
from small_models import llama, with_lora

from fedmpi.models import Folds, adapted, save_adapter, trainable, worn
from fedmpi.models.folding import DELTA
from fedmpi.tensors import Tensors, digest, num_bytes

RANK = 2


def base(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return with_lora(llama().to(dtype))


def factors(model: torch.nn.Module, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            out, inner = layer.get_base_layer().weight.shape
            made[f"{name}/A"] = torch.randn(RANK, inner, generator=generator) / 8
            made[f"{name}/B"] = torch.randn(out, RANK, generator=generator) / 8
    return made


def weights(model: torch.nn.Module) -> str:
    return digest({name: p for name, p in model.named_parameters() if not p.requires_grad})


def test_the_base_moves_by_the_scaled_product() -> None:
    model = base()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before, made = layer.get_base_layer().weight.clone(), factors(model, 0)
    Folds(lambda: model).fold(made)
    a, b = (made[f"base_model.model.model.layers.0.self_attn.q_proj/{factor}"].double() for factor in "AB")
    torch.testing.assert_close(layer.get_base_layer().weight, (before.double() + 2.0 * b @ a).float())  # alpha 8, rank 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_missed_folds_ends_in_the_same_bytes(dtype: torch.dtype) -> None:
    server, follower, late, restarted = (Folds(lambda model=model: model) for model in (base(dtype) for _ in range(4)))
    for seed in range(4):
        server.fold(factors(server.model(), seed))
        if seed != 2:  # this one leaves a round out
            follower.catch_up(server.since(follower.version))
    late.catch_up(server.since(0))
    restarted.restore(server.saved())
    assert {folds.version for folds in (server, follower, late, restarted)} == {4}
    assert len({weights(folds.model()) for folds in (server, follower, late, restarted)}) == 1
    assert weights(server.model()) != weights(base(dtype))


def test_few_missed_folds_travel_as_factors_many_as_their_sum() -> None:
    model = base()
    server, made = Folds(lambda: model), factors(model, 0)
    for seed in range(8):
        server.fold(factors(model, seed))
    assert num_bytes(server.since(7)) == num_bytes(made) + 8
    assert num_bytes(server.since(0)) == num_bytes(server.sums) + 8 == server.most_bytes() + 8 < 8 * num_bytes(made)


def test_another_training_begins_on_the_base_as_it_was_loaded() -> None:
    model = base()
    before, folds = weights(model), Folds(lambda: model)
    folds.fold(factors(model, 0))
    folds.restore({})
    assert weights(model) == before and folds.version == 0 and folds.saved() == {}


def test_the_folder_gives_the_model_back(tmp_path: Path) -> None:
    """Opened by its path alone, and taken off again without a trace."""
    model = base()
    folds = Folds(lambda: model)
    folds.fold(factors(model, 0))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    save_adapter(model, trainable(model), tmp_path)
    folds.save(tmp_path)
    assert torch.equal(adapted(llama(), tmp_path)(ids).logits, expected)
    plain = llama()
    before = plain(ids).logits
    with worn(plain, tmp_path) as wearing:
        assert torch.equal(wearing(ids).logits, expected)
    assert torch.equal(plain(ids).logits, before)


def test_nothing_folded_leaves_no_file(tmp_path: Path) -> None:
    Folds(base).save(tmp_path)
    assert not (tmp_path / DELTA).exists()
