"""What a process does with its rows: a length that the model cannot read is refused, options of the data reach the batches."""

from dataclasses import replace

import pytest
import torch

from fedmpi import data, evaluation, models, training
from fedmpi.errors import ConfigError
from fedmpi.hosting.base import Base
from fedmpi.hosting.host import Host, pick_device


@pytest.fixture(scope="module")
def base():
    return Base(models.Config(), models.PeftConfig(rank=2), "cpu", 0)


def host(base, **settings):
    config = data.Config(num_rows=40, **settings)
    return Host(base, data.federate(config, 2, 0), config, training.Config(), evaluation.Config())


def test_a_length_above_the_models_positions_is_refused(base):
    assert host(base, max_length=2048).examples(0)
    words = "data.max_length is 2049, but builtin:tiny has 2048 positions: give at most 2048"
    for part in (lambda h: h.examples(0), lambda h: h.heldout):
        with pytest.raises(ConfigError, match=words):
            part(host(base, max_length=2049))


def test_ranks_share_the_gpus_that_there_are(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(asked, 3) for asked in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert taken == ["cuda:1", "cuda:1", "cuda:0"], "what is not told a device takes the current one"
    with pytest.raises(ConfigError, match="device 'cuda:2': torch finds 2 GPUs here"):
        pick_device("cuda:2", 0)
    for asked in ("cuda:x", "cuda:-1", "tpu"):
        with pytest.raises(ConfigError, match=f"device '{asked}': allowed are auto, cpu, cuda"):
            pick_device(asked, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto", 3) == "cpu"
    with pytest.raises(ConfigError, match="no GPU here"):
        pick_device("cuda", 0)


def test_like_lengths_meet_only_where_asked(base):
    assert isinstance(host(base, group_by_length=True).examples(1), data.ByLength)
    assert not isinstance(host(base).examples(1), data.ByLength)


def test_the_cache_is_used_for_training_and_held_out_rows(base, tmp_path):
    first = host(base, cache=str(tmp_path))
    made = first.examples(0), first.heldout
    assert len(list(tmp_path.iterdir())) == 2
    again = host(base, cache=str(tmp_path))
    assert (again.examples(0), again.heldout) == made


def test_a_chat_template_is_named_by_its_text(base, monkeypatch):
    with pytest.raises(ConfigError, match="has no chat template"):
        host(base, template="chat")
    monkeypatch.setattr(base.tokenizer, "chat_template", "{{ messages[0]['content'] }}\n")
    chatty = host(base, template="chat")
    assert chatty.parties.record["template_hash"] == data.template_hash("chat", base.tokenizer) is not None
    assert chatty.examples(0)
    short = replace(chatty, eval=evaluation.Config(rows=2, max_new_tokens=2))
    assert short.answer(None)["exact_match"] == 0.0  # two tokens are no answer, but the prompts could be written
