"""The program: each model's own words, on one base; a run's folders are found by its scenario; faults are one line."""

from argparse import Namespace
from pathlib import Path

import pytest

from fedmpi import config, data, generate, models
from fedmpi.errors import ConfigError
from fedmpi.evaluation.decoding import Decoding
from fedmpi.evaluation.speaker import open_speaker
from fedmpi.settings import recipe
from fedmpi.settings.recipe import Recipe

PROMPTS = ["Say the word moon backwards.", "Add 3 and 4."]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What `scenario all` leaves of two clients; every adapter does something else."""
    folder = tmp_path_factory.mktemp("run")
    recipe = Recipe(scenario="all", clients=2, data=data.Config(num_rows=60))
    (folder / "config.yaml").write_text(config.to_yaml(recipe.settings()))
    model = models.add_adapter(models.load_model(recipe.model), recipe.peft, 0)
    fresh = models.trainable(model)
    for number, name in enumerate((".", "global", "local/clients/0", "local/clients/1"), start=1):
        models.save_adapter(model, {key: value + 0.1 * number for key, value in fresh.items()}, folder / name / "adapter")
    return folder


def given(run_dir: Path, compare: str, **changed) -> Namespace:
    arguments = [str(run_dir), "--compare", compare, "--max_new_tokens", "8", "--device", "cpu"]
    for prompt in PROMPTS:
        arguments += ["--prompt", prompt]
    return Namespace(**{**vars(generate._parser().parse_args(arguments)), **changed})


def test_each_model_speaks_as_it_would_alone(run_dir):
    """Adapters come and go on one base: none leaves a trace for the next."""
    found = generate.answers(given(run_dir, "fed,base,global,local,base"))
    rendered = [data.render(prompt, "") for prompt in PROMPTS]
    alone = {
        name: open_speaker(models.Config(), folder and run_dir / folder / "adapter", "cpu", 1).say(rendered, Decoding(8), PROMPTS)
        for name, folder in {"fed": ".", "base": None, "global": "global", "client 0 alone": "local/clients/0"}.items()
    }
    for index, (prompt, voices) in enumerate(found):
        assert prompt == PROMPTS[index]
        assert [title for title, _ in voices] == ["fed", "base", "global", "client 0 alone", "client 1 alone", "base"]
        for title, text in voices:
            assert title == "client 1 alone" or text == alone[title][index]
    assert len({text for _, text in found[0][1]}) >= 3


def test_sampling_follows_the_seed(run_dir):
    hot = {"temperature": 1.5, "seed": 1}
    one, same, other = (generate.answers(given(run_dir, "fed", **{**hot, **more})) for more in ({}, {"batch_size": 1}, {"seed": 2}))
    assert one == same != other


@pytest.mark.parametrize(
    ("compare", "expected"),
    [("base,nobody", "'nobody': allowed are base, fed"), ("local:7", "holds no adapter"), ("fed,local:x", "holds no adapter")],
)
def test_who_is_not_there_is_told(run_dir, compare, expected, capsys):
    assert generate.main([str(run_dir), "--prompt", "a", "--compare", compare]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.splitlines()) == 1


def test_a_run_of_one_scenario_has_no_others(run_dir, tmp_path):
    assert list(generate.find_voices(run_dir, "fed", "base,fed")) == [("base", None), ("fed", run_dir / "adapter")]
    with pytest.raises(ConfigError, match="--compare fed.*scenario is global"):
        list(generate.find_voices(run_dir, "global", "fed"))
    with pytest.raises(ConfigError, match="is no run folder: it has no config.yaml"):
        recipe.of_run(tmp_path)


def test_the_command_prints_both(run_dir, capsys):
    assert generate.main([str(run_dir), "--prompt", "Add 1 and 2.", "--max_new_tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.index("> Add 1 and 2.") < said.index("[base]") < said.index("[fed]")
