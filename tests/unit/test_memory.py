"""A step that runs out of memory is done again in smaller micro-batches, with the same sum of losses."""

import pytest
import torch
from small_models import PAD, examples, llama, trained, with_lora

from fedmpi.errors import ConfigError
from fedmpi.training import Config, fit, loop, memory

SETTINGS = {"steps": 3, "batch_size": 8, "optimizer": "sgd", "lr": 0.5, "clip_norm": None}


def limited(monkeypatch: pytest.MonkeyPatch, most_rows: int, error: Exception) -> list[int]:
    """No forward pass of more rows than this; gives the sizes of those that were tried."""
    whole, tried = loop._loss, []

    def loss(turn, batch):
        tried.append(len(batch.input_ids))
        if len(batch.input_ids) > most_rows:
            raise error
        return whole(turn, batch)

    monkeypatch.setattr(loop, "_loss", loss)
    return tried


ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_a_step_is_done_again_in_smaller_parts(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    whole, parts = with_lora(llama()), with_lora(llama())
    expected = fit(whole, examples(11), Config(**SETTINGS), seed=1, pad_id=PAD)
    tried = limited(monkeypatch, 3, error)
    found = fit(parts, examples(11), Config(**SETTINGS), seed=1, pad_id=PAD)
    assert tried[:4] == [8, 4, 2, 2] and max(tried[2:]) <= 3  # it stays at what has worked
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (found.tokens, found.supervised, found.examples) == (expected.tokens, expected.supervised, expected.examples)
    for name, value in trained(whole).items():
        torch.testing.assert_close(trained(parts)[name], value, rtol=1e-4, atol=1e-6)


def test_where_a_row_is_too_much_or_fail_is_asked_for_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = limited(monkeypatch, 0, ERRORS[0])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(with_lora(llama()), examples(8), Config(**SETTINGS), seed=1, pad_id=PAD)
    assert tried == [8, 4, 2, 1]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(with_lora(llama()), examples(8), Config(**SETTINGS, on_oom="fail"), seed=1, pad_id=PAD)
    assert tried[4:] == [8]
    with pytest.raises(ConfigError, match="train.on_oom is 'maybe'; allowed is one of retry, fail"):
        Config(on_oom="maybe")


def test_what_is_no_want_of_memory_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = limited(monkeypatch, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        fit(with_lora(llama()), examples(8), Config(**SETTINGS), seed=1, pad_id=PAD)
    assert tried == [8] and not memory.ran_out(ValueError("out of memory"))
