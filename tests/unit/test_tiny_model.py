"""builtin:tiny: small, deep, long enough, and really trained."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmpi.data import prompts, toy
from fedmpi.models.tiny import FOLDER

TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_folder_is_small_and_the_model_deep_and_long() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if "__pycache__" not in path.parts) <= 6_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["num_hidden_layers"] >= 12
    assert config["max_position_embeddings"] >= 2048
    assert config["vocab_size"] == len(TOKENIZER)


@settings(max_examples=200)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert TOKENIZER.decode(ids_of(text), skip_special_tokens=False) == text


def test_special_tokens_stand_where_llama_has_them() -> None:
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == ("<pad>", "<s>", "</s>")
    assert TOKENIZER("hat")["input_ids"] == [TOKENIZER.bos_token_id, *ids_of("hat")]
    config = json.loads((FOLDER / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert config[name] == getattr(TOKENIZER, name)


def test_digits_are_tokens_and_the_prompt_is_cheap() -> None:
    assert [TOKENIZER.decode(token) for token in ids_of("2048")] == ["2", "0", "4", "8"]
    assert len(ids_of(prompts.render("", "."))) <= 5
    assert len(ids_of(prompts.render("", None))) <= 3
    rows = toy.rows(400, 0)
    lengths = sorted(len(ids_of(prompts.render(row["instruction"], row["input"]) + row["output"])) for row in rows)
    assert lengths[len(lengths) // 2] <= 30


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def loss(model: torch.nn.Module, texts: list[str]) -> float:
    """Mean loss per token, a text at a time."""
    total, num = 0.0, 0
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        num += ids.numel() - 1
    return total / num


def test_text_that_it_never_read_is_no_news_to_it(model: torch.nn.Module) -> None:
    documents = itertools.islice(toy.pretraining_text(12345, prompts.render), 6000, 6060)
    texts = [(read + ends).translate(dict.fromkeys(map(ord, toy.MARKS))) for read, ends in documents]
    assert loss(model, texts) < math.log(len(TOKENIZER)) / 3


def test_it_has_the_skills_of_test_problems_in_other_words(model: torch.nn.Module) -> None:
    right = [row for row in toy.rows(160, 5, "test") if row["category"] == "reverse" and row["input"]]
    wrong = [(a, b["output"]) for a, b in itertools.pairwise(right)]
    told = [f"there: {row['input']} / back: {row['output']}" for row in right]
    mistold = [f"there: {row['input']} / back: {output}" for row, output in wrong]
    assert loss(model, told) < 0.6 * loss(model, mistold)


def test_positions_past_the_training_window_are_there(model: torch.nn.Module) -> None:
    with torch.no_grad():
        logits = model(input_ids=torch.full((1, 2048), 5)).logits
    assert torch.isfinite(logits).all()
