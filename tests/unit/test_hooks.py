"""Hooks: the five points, their order, what they may change, and names that cannot be loaded."""

import pytest
import torch
from small_models import PAD, examples, llama, trained, with_lora

from fedmpi.errors import ConfigError
from fedmpi.training import Config, Hook, fit, load_hooks


class Recorder(Hook):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def before_fit(self, model):
        self.log.append((self.name, "before_fit"))

    def before_step(self, step):
        assert step.loss is None and all(p.grad is None for p in step.model.parameters())
        self.log.append((self.name, "before_step", step.index))

    def after_backward(self, step):
        assert float(step.loss) > 0 and any(p.grad is not None for p in step.model.parameters())
        self.log.append((self.name, "after_backward", step.index))

    def after_step(self, step):
        self.log.append((self.name, "after_step", step.index))

    def after_fit(self, model):
        self.log.append((self.name, "after_fit"))


def test_several_hooks_are_called_in_the_given_order_at_every_point():
    log = []
    hooks = [Recorder("a", log), Recorder("b", log)]
    fit(with_lora(llama()), examples(4), Config(steps=2, batch_size=2), seed=0, pad_id=PAD, hooks=hooks)
    points = [("before_fit",)]
    for index in range(2):
        points += [("before_step", index), ("after_backward", index), ("after_step", index)]
    points += [("after_fit",)]
    assert log == [(name, *point) for point in points for name in "ab"]


class Pull(Hook):
    """A proximal term (mu / 2) * |w - start|^2, added as a loss of its own."""

    def __init__(self, mu):
        self.mu = mu

    def before_fit(self, model):
        self.start = trained(model)

    def after_backward(self, step):
        named = dict(step.model.named_parameters())
        term = sum((named[name] - start).square().sum() for name, start in self.start.items())
        (self.mu / 2 * term).backward()


def test_a_hook_may_add_a_term_to_the_loss():
    def distance(mu):
        model = with_lora(llama())
        before = trained(model)
        config = Config(steps=20, batch_size=4, lr=1e-2)
        fit(model, examples(4), config, seed=0, pad_id=PAD, hooks=[Pull(mu)])
        return sum(float((value - before[name]).square().sum()) for name, value in trained(model).items())

    free, near = distance(0.0), distance(10.0)
    assert 0 < near < 0.5 * free


def test_a_hook_that_does_nothing_changes_nothing():
    plain, hooked = with_lora(llama(), dropout=0.1), with_lora(llama(), dropout=0.1)
    fit(plain, examples(4), Config(steps=2), seed=0, pad_id=PAD)
    fit(hooked, examples(4), Config(steps=2, hooks=("fedmpi.training.Hook",)), seed=0, pad_id=PAD, hooks=[Hook()])
    assert all(torch.equal(trained(plain)[name], value) for name, value in trained(hooked).items())


def test_hooks_by_name_are_new_objects_in_order(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text(
        "from fedmpi.training import Hook\nmade = []\nclass First(Hook):\n    def __init__(self): made.append(self)\n"
        "class Second(First): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ("users_own.First", "users_own.Second")
    assert [type(hook).__name__ for hook in load_hooks(names)] == ["First", "Second"]
    fit(with_lora(llama()), examples(2), Config(steps=1, hooks=names), seed=0, pad_id=PAD)
    import users_own

    assert len(users_own.made) == 4 and len(set(map(id, users_own.made))) == 4


def test_hooks_written_in_one_line_are_the_same_configuration():
    assert Config(hooks="my.First, my.Second") == Config(hooks=("my.First", "my.Second"))
    assert Config(hooks="").hooks == ()


def test_every_bad_name_is_listed():
    names = ("plain", "no.such.Module", "fedmpi.training.Absent", "collections.OrderedDict", "fedmpi.training.Hook")
    with pytest.raises(ConfigError) as caught:
        load_hooks(names)
    message = str(caught.value)
    assert message.startswith("train.hooks: cannot load ") and "\n" not in message
    for name, why in zip(names[:4], ("no module", "No module named 'no'", "offers no 'Absent'", "not a Hook"), strict=True):
        assert name in message and why in message
    assert "fedmpi.training.Hook (" not in message
