"""Prompts and tokens: the template's text, an exact boundary, the cutting rules; on a tokenizer that counts words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi import data
from fedmpi.data.prompts import IGNORED, encode_prompts, render, template_hash, tokenize
from fedmpi.errors import ConfigError, DataError

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
    assert template_hash("alpaca") != template_hash("qa")
    with pytest.raises(ConfigError, match="allowed are alpaca, qa, chat, or a file"):
        template_hash("nope")


def test_qa_keeps_the_blank_with_the_response():
    assert render("Who?", "", "qa") == "Q: Who?\nA:"
    assert render("Who?", "Bach wrote it.", "qa") == "Bach wrote it.\n\nQ: Who?\nA:"
    heard = []

    class Listening(Words):
        def __call__(self, texts, **options):
            heard.extend(texts)
            return super().__call__(texts, **options)

    tokenize([row("Who?", "Bach")], Listening(), data.Config(template="qa"))
    assert heard == ["Q: Who?\nA:", " Bach"]


def own(tmp_path, text):
    path = tmp_path / f"{abs(hash(text))}.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_is_a_template(tmp_path):
    one = own(tmp_path, "<<{instruction}|{input}>> {x} {response}\n")
    assert render("a {input}", "b", one) == "<<a {input}|b>> {x}"
    assert render("a", None, one) == "<<a|>> {x}"
    two = own(tmp_path, "with {input}: {instruction}\n{response}\n---\nplain {instruction}\n{response}\n")
    assert (render("a", "b", two), render("a", "", two)) == ("with b: a\n", "plain a\n")
    assert template_hash(one) != template_hash(two)
    [example], _ = tokenize([row()], Words(), data.Config(template=one))
    assert example.labels[-1] == EOS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{instruction}\n", "has no place {response}"),
        ("{input} {response}", "has no place {instruction} before {response}"),
        ("{response} {instruction}", "goes on after {response} with '{instruction}'"),
        ("{instruction} {response}</s>", "goes on after {response} with '</s>'"),
        ("{instruction}{response}\n---\n{instruction} {response}", "one form has a blank and the other none"),
        ("{instruction}{response}\n---\n" * 3, "has 4 forms"),
        ("", "has no place {response}"),
    ],
)
def test_a_template_that_cannot_be(tmp_path, text, words):
    name = own(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        render("a", "b", name)
    assert name in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_an_input_without_a_place_is_refused_and_not_lost(tmp_path):
    name = own(tmp_path, "{instruction}{response}")
    assert render("a", "", name) == "a"
    with pytest.raises(DataError, match="has no place {input}, but a row has an input: 'b'"):
        render("a", "b", name)


def test_a_template_is_refused_before_a_model_is_loaded(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "response": "b"}\n' * 8)
    config = data.Config(name="json", path=str(rows), template=own(tmp_path, "{instruction}"))
    with pytest.raises(ConfigError, match="no place {response}"):
        data.federate(config, 2, 0)


class Chatty(Words):
    """A tokenizer with a template that writes its own BOS."""

    chat_template = "{{ a template }}"

    def apply_chat_template(self, said, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is True and [turn["role"] for turn in said] == ["user"]
        return f"<s> user {said[0]['content']} assistant"


def test_chat_is_the_tokenizers_own_template_without_a_second_bos():
    tokenizer = Chatty()
    [example], _ = tokenize([row("say", "yes", input="it")], tokenizer, data.Config(template="chat"))
    named = {index: word for word, index in tokenizer.seen.items()}
    assert [named.get(i, i) for i in example.input_ids] == ["<s>", "user", "say", "it", "assistant", "yes", EOS]
    assert example.labels == [IGNORED] * 5 + example.input_ids[5:]
    assert template_hash("chat") is None and template_hash("chat", tokenizer) is not None
    with pytest.raises(ConfigError, match="has no chat template: give alpaca, qa or a file"):
        tokenize([row()], type("Plain", (Words,), {"chat_template": None})(), data.Config(template="chat"))
    with pytest.raises(ConfigError, match="none is at hand"):
        render("a", "b", "chat")


@settings(max_examples=80)
@given(
    prompt=st.integers(0, 90),
    response=st.integers(0, 90),
    max_length=st.integers(32, 120),
)
def test_whatever_the_lengths_the_cut_keeps_its_promises(prompt, response, max_length):
    tokenizer = Words()
    config = data.Config(max_length=max_length, template="qa")
    [example], counts = tokenize([row(words(prompt), words(response, "r"))], tokenizer, config)
    supervised = [label for label in example.labels if label != IGNORED]
    whole = len(encode_prompts([render(words(prompt), "", "qa")], tokenizer)[0]) + response + 1
    assert len(example.input_ids) == len(example.labels) == min(whole, max_length) == counts.tokens
    assert example.input_ids[len(example.labels) - len(supervised) :] == supervised
    assert len(supervised) >= min(response + 1, max_length - 16) and counts.cut == (whole > max_length)
    assert counts.cut_responses == (len(supervised) <= response)


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
