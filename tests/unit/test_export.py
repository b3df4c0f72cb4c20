"""Export: a folder that transformers opens by itself, and that says what the adapter on its base says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmpi import config, export, models
from fedmpi.evaluation.loss import inference
from fedmpi.settings.recipe import Recipe


def finished_run(folder, peft, dtype="float32", quantization="none"):
    """The folder of a run that left an adapter with some values."""
    recipe = Recipe(model=models.Config(dtype=dtype, quantization=quantization), peft=peft)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(recipe.settings()))
    model = models.add_adapter(models.load_model(recipe.model), peft, 0)
    generator = torch.Generator().manual_seed(0)
    values = {name: t + 0.04 * torch.randn(t.shape, generator=generator) for name, t in models.trainable(model).items()}
    models.load_trainable(model, values)
    models.save_adapter(model, values, folder / "adapter")
    return model


@pytest.mark.parametrize(
    ("peft", "dtype", "tolerance"),
    [
        (models.PeftConfig(), "float32", 2e-4),
        (models.PeftConfig(rslora=True, dora=True, target_modules="all-linear"), "float32", 2e-4),
        (models.PeftConfig(target_modules="all-linear"), "bfloat16", 0.03),
        (models.PeftConfig(method="none"), "float32", 0.0),
    ],
)
def test_the_merged_model_is_the_adapter_on_its_base(tmp_path, capsys, peft, dtype, tolerance):
    model = finished_run(tmp_path / "run", peft, dtype)
    assert export.main([str(tmp_path / "run"), "--merge", "--out", str(tmp_path / "out")]) == 0
    assert "parameters in" in capsys.readouterr().out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("Name three colours.")["input_ids"]])
    assert ids.tolist() == [models.load_tokenizer(models.Config())("Name three colours.")["input_ids"]]
    with inference(model), inference(again):
        expected, found = model(ids).logits.float(), again(ids).logits.float()
    tolerance *= float(expected.abs().max())
    assert (expected - found).abs().max() <= tolerance
    base = models.load_model(models.Config())
    with inference(base):
        assert (base(ids).logits - found).abs().max() > 3 * tolerance
    assert again.config.dtype == getattr(torch, dtype)
    for path in (tmp_path / "out").glob("*.json"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 2e-4), ("int8", 0.1)])
def test_on_a_quantised_base_it_is_merged_into_what_the_run_trained_on(tmp_path, quantization, tolerance):
    """In full numbers, where a small product is not rounded away; int8 rounds what goes into a product, too."""
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes here: pip install 'fedmpi[quant]'")
    model = finished_run(tmp_path / "run", models.PeftConfig(), quantization=quantization)
    assert export.main([str(tmp_path / "run"), "--merge"]) == 0
    again = models.load_model(models.Config(str(tmp_path / "run" / "merged")))
    assert {p.dtype for p in again.parameters()} == {torch.float32} and "quant" not in again.config.to_json_string()
    ids = torch.arange(5, 40)[None]
    with inference(model), inference(again):
        expected, found = model(ids).logits, again(ids).logits
    assert (expected - found).abs().max() <= tolerance * expected.abs().max()


def test_the_default_folder_is_written_once(tmp_path, capsys):
    finished_run(tmp_path / "run", models.PeftConfig())
    assert export.main([str(tmp_path / "run"), "--merge"]) == 0
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file() and not list((tmp_path / "run").glob("*.part"))
    assert export.main([str(tmp_path / "run"), "--merge"]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["prefix", "ptuning", "prompt"])
def test_virtual_tokens_cannot_be_merged(tmp_path, capsys, method):
    finished_run(tmp_path / "run", models.PeftConfig(method=method))
    assert export.main([str(tmp_path / "run"), "--merge"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "virtual tokens" in line and "keep the adapter" in line
    assert not (tmp_path / "run" / "merged").exists()


def test_what_cannot_be_exported(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert export.main([str(tmp_path / "empty"), "--merge"]) != 0
    finished_run(tmp_path / "run", models.PeftConfig())
    assert export.main([str(tmp_path / "run")]) == 2
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3}))
    assert export.main([str(tmp_path / "run"), "--merge"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
