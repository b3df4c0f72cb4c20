"""A speaker's answers do not depend on the batch; its draws follow the model; nothing in the checkpoint changes them."""

from collections import Counter

import pytest
import torch
from small_models import examples, llama
from test_exact_match import Letters

from fedmpi.errors import ConfigError
from fedmpi.evaluation.decoding import Decoding, cut_at
from fedmpi.evaluation.loss import heldout_loss
from fedmpi.evaluation.speaker import ModelSpeaker

PROMPTS = ["Tell", "Tell me more", "T", "Tell me a story", "No"]
KEYS = list("abcde")


def speaker(batch_size: int = 16, spread: float = 0.5) -> ModelSpeaker:
    return ModelSpeaker(llama(vocab=100, spread=spread), Letters(), batch_size)


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_batch_nor_order_moves_an_answer(temperature, pad, monkeypatch):
    """Nor what prompts are padded with, the end token too."""
    monkeypatch.setattr(Letters, "pad_token_id", pad)
    decoding = Decoding(max_new_tokens=12, temperature=temperature, top_k=50, top_p=0.9, seed=3)
    whole = speaker().say(PROMPTS, decoding, KEYS)
    assert speaker(1).say(PROMPTS, decoding, KEYS) == whole == speaker(2).say(PROMPTS[::-1], decoding, KEYS[::-1])[::-1]


def test_a_draw_depends_on_seed_and_key():
    one, two, three = (
        speaker().say(["Tell"] * 2, Decoding(max_new_tokens=8, temperature=2.0, seed=seed), keys)
        for seed, keys in ((0, "ab"), (0, "ba"), (1, "ab"))
    )
    assert one[0] != one[1] and one == two[::-1] and one != three


def test_draws_have_the_probabilities_of_the_model():
    """One token, 2,000 draws, top 3: each share within four standard deviations of the renormalised probability."""
    model = llama(vocab=100, spread=0.5)
    ids = torch.tensor([[1, *Letters()(["Go"])["input_ids"][0]]])
    top = (model(ids).logits[0, -1] / 2.0).softmax(-1).topk(3)
    expected = dict(zip(top.indices.tolist(), (top.values / top.values.sum()).tolist(), strict=True))
    decoding = Decoding(max_new_tokens=1, temperature=2.0, top_k=3)
    said = ModelSpeaker(model, Letters(), 500).say(["Go"] * 2000, decoding, [str(i) for i in range(2000)])
    counts = Counter(ord(text) - 256 for text in said)
    assert counts.keys() <= expected.keys()
    for token, share in expected.items():
        assert abs(counts[token] / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5


def test_top_p_keeps_the_least_set_that_holds_it():
    """With a tiny top_p only the first choice is left: the greedy answer."""
    greedy = speaker().say(PROMPTS, Decoding(max_new_tokens=6), KEYS)
    assert speaker().say(PROMPTS, Decoding(max_new_tokens=6, temperature=5.0, top_p=1e-6), KEYS) == greedy


def test_a_stop_string_ends_an_answer_and_is_not_in_it():
    whole = speaker().say(["Tell"], Decoding(max_new_tokens=40), ["a"])[0]
    stop = whole[20]
    assert speaker().say(["Tell"], Decoding(max_new_tokens=40, stop=(stop,)), ["a"])[0] == whole.split(stop)[0]
    assert cut_at("one\ntwo. three", (". ", "\n")) == "one"


def test_generation_settings_of_the_checkpoint_change_nothing():
    """The original evaluation was greedy or sampled as the checkpoint's generation_config happened to say."""
    plain, coloured = speaker(), speaker()
    coloured.model.generation_config.update(do_sample=True, temperature=3.0, top_k=5, repetition_penalty=5.0, min_length=30)
    wanted = Decoding(max_new_tokens=10)
    assert plain.say(PROMPTS, wanted, KEYS) == coloured.say(PROMPTS, wanted, KEYS)


def test_measures_add_up_to_the_heldout_loss():
    model, rows = llama(vocab=50), examples(7)
    found = ModelSpeaker(model, Letters(), 3).measure(rows)
    score = heldout_loss(model, rows, 64, 0)
    assert sum(m.num_tokens for m in found) == score.num_tokens
    assert sum(m.loss for m in found) / score.num_tokens == pytest.approx(score.loss, rel=1e-6)
    assert sum(m.right for m in found) / score.num_tokens == score.token_accuracy


def test_a_prompt_that_does_not_fit_loses_its_left_and_is_counted():
    long = speaker()
    answers = long.say(["x" * 2000 + "Tell", "x" * 1500 + "Tell"], Decoding(max_new_tokens=4), "ab")
    assert answers[0] == answers[1] and long.cut == 2


def test_answers_that_leave_no_room_are_refused():
    with pytest.raises(ConfigError, match="leaves 4 of the model's 1024 tokens.*at most 1008"):
        speaker().say(["Tell"], Decoding(max_new_tokens=1020), "a")
