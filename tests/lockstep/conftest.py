"""A model folder and a recipe that are small enough to run a federation in a second."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    return write_model(tmp_path_factory.mktemp("model"), 2)


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of eight layers, enough to cut it up."""
    return write_model(tmp_path_factory.mktemp("deep"), 8)


def write_model(folder: Path, layers: int) -> Path:
    """A random Llama with a byte-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from fedmpi.models import without_optional

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with without_optional():
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_folder: Path) -> list[str]:
    """Everything on that could tell placements apart: sampling, unequal clients, dropout, accumulation, evaluation."""
    return [
        f"--model.path={model_folder}",
        "--rounds=4",
        "--clients=9",
        "--clients_per_round=5",
        "--data.num_rows=120",
        "--data.splitter=dirichlet",
        "--data.max_length=128",
        "--peft.dropout=0.1",
        "--train.steps=2",
        "--train.batch_size=2",
        "--train.accumulation=2",
        "--train.lr=0.01",
        "--eval.rows=4",
        "--eval.max_new_tokens=2",
    ]
