"""Prompts and tokens: the template's text, an exact boundary, the cutting rules; on a tokenizer that counts words."""

import pytest

from fedmpi import data
from fedmpi.data.prompts import IGNORED, encode_prompts, render, template_hash, tokenize
from fedmpi.errors import ConfigError

BOS, EOS = 1, 2


class Words:
    """A token per word, its id the order of its first appearance."""

    eos_token_id = EOS

    def __init__(self, bos=BOS):
        self.bos_token_id, self.seen, self.calls = bos, {}, 0

    def __call__(self, texts, add_special_tokens, **_):
        assert add_special_tokens is False
        self.calls += 1
        return {"input_ids": [[self.seen.setdefault(word, 10 + len(self.seen)) for word in t.split()] for t in texts]}


def row(instruction="say it", output="yes", **more):
    return data.Row(instruction, more.get("input", ""), output, "", more.get("id", "train:0"))


def words(num, letter="w"):
    return " ".join(f"{letter}{i}" for i in range(num))


def test_template_with_and_without_input():
    assert render("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert (
        render("Add.", None)
        == render("Add.", "")
        == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Response:\n"
        )
    )


def test_braces_in_a_row_are_text():
    assert "{input} {0} {x!r}" in render("{input} {0} {x!r}", "{instruction}")


def test_template_hash_names_the_text():
    assert len(template_hash("alpaca")) == 16
    with pytest.raises(ConfigError, match="allowed are alpaca"):
        template_hash("nope")


def test_prompt_is_masked_and_response_ends_in_eos():
    tokenizer = Words()
    [example], counts = tokenize([row(output="one two")], tokenizer, data.Config())
    prompt = encode_prompts([render("say it", "")], tokenizer)[0]
    response = [tokenizer.seen["one"], tokenizer.seen["two"], EOS]
    assert example.input_ids == prompt + response and prompt[0] == BOS
    assert example.labels == [IGNORED] * len(prompt) + response
    assert (counts.rows, counts.cut, counts.dropped, counts.tokens) == (1, 0, 0, len(prompt) + 3)


def test_without_a_bos_nothing_is_put_in_front():
    tokenizer = Words(bos=None)
    [example], _ = tokenize([row()], tokenizer, data.Config())
    assert example.input_ids[0] == tokenizer.seen["Below"]


def test_long_prompt_is_cut_from_its_left():
    tokenizer = Words()
    [example], counts = tokenize([row(words(60), "one two")], tokenizer, data.Config(max_length=40))
    prompt = encode_prompts([render(words(60), "")], tokenizer)[0]
    assert example.input_ids[:37] == prompt[-37:] and len(example.input_ids) == 40
    assert example.labels[37:] == [tokenizer.seen["one"], tokenizer.seen["two"], EOS]
    assert (counts.cut, counts.cut_responses) == (1, 0)


def test_long_response_leaves_the_prompt_its_last_16_and_loses_its_end():
    tokenizer = Words()
    [example], counts = tokenize([row(words(60), words(50, "r"))], tokenizer, data.Config(max_length=40))
    prompt = encode_prompts([render(words(60), "")], tokenizer)[0]
    assert example.input_ids[:16] == prompt[-16:]
    assert example.labels == [IGNORED] * 16 + [tokenizer.seen[f"r{i}"] for i in range(24)]
    assert (counts.cut, counts.cut_responses, counts.tokens) == (1, 1, 40)


@pytest.mark.parametrize("length", range(15, 45))
def test_a_response_always_remains_and_nothing_is_cut_without_need(length):
    tokenizer = Words()
    [example], counts = tokenize([row(words(9), words(length, "r"))], tokenizer, data.Config(max_length=40))
    whole = len(encode_prompts([render(words(9), "")], tokenizer)[0]) + length + 1
    assert len(example.input_ids) == min(whole, 40) and counts.cut == (whole > 40)
    supervised = [label for label in example.labels if label != IGNORED]
    assert len(supervised) == min(length + 1, 24) and (supervised[-1] == EOS) == (length + 1 <= 24)


def test_empty_response_still_teaches_the_end():
    [example], counts = tokenize([row(output="")], Words(), data.Config())
    assert example.labels[-1] == EOS and counts.dropped == 0


def test_sample_without_a_supervised_token_is_counted_and_dropped(monkeypatch):
    from fedmpi.data import prompts

    monkeypatch.setattr(prompts, "TEMPLATES", {"bare": prompts.Template("{instruction}", "{instruction}")})
    tokenizer = Words(bos=None)
    rows = [row("", "", id="train:0"), row("ask", "one", id="train:1")]
    examples, counts = tokenize(rows, tokenizer, data.Config(template="bare"))
    assert [example.id for example in examples] == ["train:1"]
    assert (counts.rows, counts.dropped, counts.tokens) == (2, 1, 3)


def test_tokenizer_is_asked_in_batches():
    tokenizer = Words()
    tokenize([row(id=f"train:{i}") for i in range(50)], tokenizer, data.Config())
    assert tokenizer.calls == 2
    assert tokenize([], tokenizer, data.Config())[0] == []
