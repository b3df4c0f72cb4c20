"""Backbones: what is loaded, frozen and named, and what is refused in one line, on a small random Llama in a folder."""

import json
import shutil
import socket
import ssl
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedmpi import data
from fedmpi.errors import ModelError
from fedmpi.models import Config, backbone, base_of, load_model, load_tokenizer, public_name

SHARED = Path(__file__).parents[3] / "shared" / "data" / "models"


def save_tokenizer(folder, **special):
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "say", "it", "yes"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "little"
    llama().save_pretrained(folder)
    save_tokenizer(folder, bos_token="<s>", eos_token="</s>")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "little")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a local model asked the network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def refuse_with(words, config):
    with pytest.raises(ModelError, match=words) as caught:
        load_model(config)
    assert "\n" not in str(caught.value)


def test_folder_is_loaded_frozen_and_equal(folder):
    model = load_model(Config(str(folder)))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(ids).logits, llama()(ids).logits)


def test_dtype_as_asked(folder):
    assert load_model(Config(str(folder), dtype="bfloat16")).dtype == torch.bfloat16
    assert backbone.dtype_of(Config(), "cuda") == torch.bfloat16
    assert backbone.dtype_of(Config(dtype="float32"), "cuda:1") == torch.float32


def test_public_name_is_never_a_path(folder, monkeypatch):
    assert public_name(Config(str(folder))) == "little"
    assert load_model(Config(str(folder))).name_or_path == "little"
    monkeypatch.chdir(folder)
    assert public_name(Config(".")) == "little"
    assert public_name(Config("some-org/some-model")) == "some-org/some-model"
    assert public_name(Config("builtin:tiny")) == "builtin:tiny"


def test_tokenizer_without_pad_pads_with_eos(folder):
    tokenizer = load_tokenizer(Config(str(folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    save_tokenizer(folder, eos_token="</s>", pad_token="<unk>")
    assert load_tokenizer(Config(str(folder))).pad_token_id == 0


def test_tokenizer_without_an_end_is_refused(folder):
    save_tokenizer(folder)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(Config(str(folder)))


def test_tokenizer_that_is_missing_is_refused(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"the tokenizer of model\.path") as caught:
        load_tokenizer(Config(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "a/b/c", "builtin:huge"])
def test_missing_folder(path):
    with pytest.raises(ModelError, match=r"no folder|not in the package"):
        base_of(Config(path))


def test_file_instead_of_a_folder(folder):
    refuse_with("no folder", Config(str(folder / "config.json")))


def test_pickled_weights_are_never_opened(folder):
    weights = folder / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    refuse_with(r"only pickled weights \(pytorch_model.bin\)", Config(str(folder)))
    (folder / "pytorch_model.bin").unlink()
    refuse_with("no weights", Config(str(folder)))


def test_code_of_a_model_is_never_run(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('run')")
    (folder / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    refuse_with("brings its own code", Config(str(folder)))


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no config.json"), ("{", "config.json cannot be read"), ('{"model_type": "nope"}', "cannot be loaded")],
)
def test_unreadable_config(folder, content, words):
    (folder / "config.json").unlink()
    if content:
        (folder / "config.json").write_text(content)
    refuse_with(words, Config(str(folder)))


def test_cut_off_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse_with("the model of model.path", Config(str(folder)))


def test_missing_or_misshapen_weights_are_not_made_up(folder, capfd):
    weights = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in safetensors.torch.load_file(weights).items()}  # the file is mapped, then replaced
    name = "model.layers.0.self_attn.q_proj.weight"
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    refuse_with(f"lacks 1 weights.*{name}", Config(str(folder)))
    safetensors.torch.save_file({**tensors, name: torch.zeros(3, 3)}, weights, {"format": "pt"})
    refuse_with(f"shape differs: {name}", Config(str(folder)))
    assert capfd.readouterr() == ("", "")


def test_a_mistyped_path_that_looks_like_a_hub_id_fails_at_once_where_the_hub_is_silent(monkeypatch):
    monkeypatch.setattr(backbone, "_hub_is_silent", lambda: "no route to host")
    for path in ("models/llama-7b", "gpt2x"):
        refuse_with(f"model.path {path} is no folder here, and the hub cannot be reached .no route to host.: check", Config(path))
        with pytest.raises(ModelError, match="check the path"):
            load_tokenizer(Config(path))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), "refused"),
        (urllib.error.URLError(socket.gaierror(-2, "no such name")), "no such name"),
        (TimeoutError("timed out"), "timed out"),
        (urllib.error.HTTPError("http://hub", 403, "forbidden", {}, None), ""),  # it answers: its client says the rest
        (urllib.error.URLError(ssl.SSLError("a certificate of our own")), ""),
    ],
)
def test_whether_the_hub_answers(monkeypatch, error, words):
    def urlopen(request, timeout):
        assert request.full_url == backbone.huggingface_hub.constants.ENDPOINT and timeout <= 10
        raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert (words in backbone._hub_is_silent.__wrapped__()) if words else backbone._hub_is_silent.__wrapped__() == ""


def test_decoder_layers_are_the_longest_list():
    assert len(backbone.decoder_layers(llama(layers=5))) == 5
    with pytest.raises(ModelError, match="no list of repeated layers"):
        backbone.decoder_layers(torch.nn.Linear(2, 2))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real models: {SHARED} is missing")
def test_real_tokenizer_gives_exact_boundaries_and_padding():
    config = Config(str(SHARED / "stories260K"))
    tokenizer = load_tokenizer(config)
    rows = [data.Row("Say it.", "", "Yes, I can.", "", "r0"), data.Row("Count.", "1 2", "3", "", "r1")]
    examples, counts = data.tokenize(rows, tokenizer, data.Config())
    for row, example in zip(rows, examples, strict=True):
        supervised = [label for label in example.labels if label != -100]
        assert example.input_ids[0] == tokenizer.bos_token_id and supervised[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(supervised[:-1]).strip() == row.output
        prompt = example.input_ids[1 : len(example.input_ids) - len(supervised)]
        assert tokenizer.decode(prompt).strip() == data.render(row.instruction, row.input).strip()
    assert (counts.rows, counts.cut, counts.dropped) == (2, 0, 0)
    batch = data.collate(examples, tokenizer.eos_token_id)
    alone = [load_model(config)(torch.tensor([example.input_ids])).logits[0] for example in examples]
    together = load_model(config)(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    for i, logits in enumerate(alone):
        assert torch.allclose(together[i, : len(logits)], logits, atol=1e-4)
