"""train.compile: the same training to rounding, nothing left on the model, and one line where it cannot work."""

import shutil

import pytest
import torch
from small_models import PAD, examples, llama, trained, with_lora

from fedmpi import training
from fedmpi.errors import ConfigError
from fedmpi.settings import recipe
from fedmpi.training import Config, fit

SETTINGS = {"steps": 4, "batch_size": 3, "accumulation": 2, "optimizer": "sgd", "lr": 0.3}


def test_compiled_layers_train_like_plain_ones() -> None:
    """Lengths change from batch to batch. What turns the traced layers into code is torch's own affair: here nothing does."""
    plain, other = with_lora(llama()), with_lora(llama())
    expected = fit(plain, examples(9), Config(**SETTINGS), seed=0, pad_id=PAD)
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance(force_backend="eager"):
        found = [fit(other, examples(9), Config(**SETTINGS, compile=True), seed=0, pad_id=PAD)]
    same(plain, other, expected, found[0])
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # not one for each layer and length
    assert not any("forward" in vars(module) for module in other.modules())


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute where nobody disturbs the compiler
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here (Debian: g++)")
def test_code_that_was_made_trains_like_the_layers_as_written() -> None:
    plain, other = with_lora(llama()), with_lora(llama())
    expected = fit(plain, examples(9), Config(**SETTINGS), seed=0, pad_id=PAD)
    same(plain, other, expected, fit(other, examples(9), Config(**SETTINGS, compile=True), seed=0, pad_id=PAD))


def same(plain: torch.nn.Module, other: torch.nn.Module, expected: training.Fit, found: training.Fit) -> None:
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert (found.tokens, found.flops, found.steps) == (expected.tokens, expected.flops, expected.steps)
    for name, tensor in trained(plain).items():
        torch.testing.assert_close(trained(other)[name], tensor, rtol=0, atol=1e-5)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.compile needs a C\+\+ compiler, none of c\+\+, g\+\+, clang\+\+ is here"):
        training.check(Config(compile=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--train.engine=fsdp", "--ranks_per_client=2"],
            "train.engine is 'fsdp'; allowed is plain or ddp with train.compile true",
        ),
        (["--train.checkpointing=true"], "train.checkpointing is True; allowed is false with train.compile true"),
        (["--peft.method=prefix"], "train.compile makes one code for all layers, peft.method prefix"),
    ],
)
def test_what_it_does_not_go_with(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe.read(["--train.compile=true", *arguments], "test", "")
    assert words in str(caught.value)
