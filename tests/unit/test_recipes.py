"""Every recipe that is shipped can be read, and says what the paper says."""

from pathlib import Path

import pytest

from fedmpi.config import RECIPES
from fedmpi.errors import ConfigError
from fedmpi.settings import recipe

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "launch" / "recipes").glob("*.yaml")), *sorted(RECIPES.glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_reads(path: Path) -> None:
    wanted, _ = recipe.read(["--config", str(path)], "test", "")
    assert wanted.rounds >= 1


def test_no_arguments_are_the_packaged_quickstart() -> None:
    nothing, _ = recipe.read([], "test", "")
    named, _ = recipe.read(["--config=builtin:quickstart"], "test", "")
    assert nothing == named and nothing.scenario == "all"


def test_shepherds_setting() -> None:
    wanted, _ = recipe.read(["--config", str(ROOT / "launch" / "recipes" / "shepherd-dolly.yaml")], "test", "")
    assert (wanted.clients, wanted.rounds, wanted.train.epochs, wanted.train.batch_size) == (100, 20, 1, 32)
    assert (wanted.train.lr, wanted.train.optimizer, wanted.data.max_length, wanted.peft.rank) == (1.5e-4, "adam", 512, 8)
    assert wanted.peft.init == "gaussian" and len(wanted.peft.target_modules) == 6


FS_LLM = {path.stem: path for path in SHIPPED if path.stem.startswith(("fed-code-alpaca", "fed-dolly", "fed-gsm8k-3"))}


@pytest.mark.parametrize("name", FS_LLM)
def test_fs_llms_tables_2_and_3(name: str) -> None:
    """Twelve rows: LoRA, P-tuning and prompt tuning of LLaMA-7B, and LoRA of OPT-2.7B, on three data sets."""
    wanted, _ = recipe.read(["--config", str(FS_LLM[name])], "test", "")
    assert len(FS_LLM) == 12
    assert (wanted.rounds, wanted.train.steps, wanted.train.batch_size, wanted.model.dtype) == (500, 30, 1, "float16")
    assert wanted.train.lr in (1e-4, 3e-4, 5e-4, 1e-3, 3e-3, 5e-3)
    assert wanted.data.name == name.removesuffix("-opt").removesuffix("-ptuning").removesuffix("-prompt")
    peft = wanted.peft
    if peft.method == "lora":
        assert peft.rank == 8 and peft.alpha in (16, 32, 64, 128) and peft.dropout in (0.0, 0.1)
    elif peft.method == "ptuning":
        assert peft.encoder == "mlp" and peft.num_virtual_tokens in (10, 20, 30)
    else:
        assert peft.num_virtual_tokens == {"Program": 8, "Assume": 9, "Think": 6}[peft.init_text.split()[0]]


def test_overrides_win_over_the_recipe_and_change_the_experiment() -> None:
    plain, _ = recipe.read(["--config=builtin:quickstart"], "test", "")
    other, _ = recipe.read(["--config=builtin:quickstart", "--train.lr=0.1"], "test", "")
    placed, _ = recipe.read(["--config=builtin:quickstart", "--run_dir=x", "--timeout_s=9", "--transport=mpi"], "test", "")
    assert other.train.lr == 0.1 and other.hash() != plain.hash()
    assert placed.hash() == plain.hash()


def test_a_packaged_recipe_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="builtin:nothing"):
        recipe.read(["--config=builtin:nothing"], "test", "")


@pytest.mark.parametrize(
    "text", ["rounds: null", "train: [1, 2]", "train: 3", "- a", "algorithm: null", "algorithm: [a]", "rounds: {"]
)
def test_a_recipe_of_the_wrong_form_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError):
        recipe.read([f"--config={tmp_path / 'wrong.yaml'}"], "test", "")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--close_share=nan", "close_share is nan: it must be a finite number or null"),
        ("--timeout_s=inf", "timeout_s is inf: it must be a finite number"),
        ("--clients=1.5", "clients is 1.5: it must be a whole number or null"),
        ("--peft.encoder=x", "peft.encoder is x: it must be one of mlp, lstm or null"),
        ("--data.packing=3", "data.packing is 3: it must be true or false"),
    ],
)
def test_a_value_that_does_not_fit_is_told_in_plain_words(option: str, words: str) -> None:
    with pytest.raises(ConfigError) as told:
        recipe.read([option], "test", "")
    assert str(told.value) == words


def test_groups_are_written_as_people_write_them() -> None:
    for text in ("4,2,1", "[4,2,1]"):
        assert recipe.read([f"--groups={text}", "--train.engine=ddp"], "test", "")[0].groups == (4, 2, 1)


ROWS = {  # of FedBiOT's Tables 2 to 4 and its Figure 2, at each drop rate: recipe, further arguments, scenario, adapter
    "Offsite-tuning": ("fedot", ["--scenario=global"], "global", (2, 2)),
    "FedOT": ("fedot", [], "fed", (2, 2)),
    "FedBiOT (Adapter 2)": ("fedbiot", [], "fed", (0, 2)),
    "FedBiOT (Adapter 4)": ("fedbiot", ["--offsite.adapter_last=4"], "fed", (0, 4)),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("drop", ["0.2", "0.5"])
@pytest.mark.parametrize("task", ["gsm8k", "rosetta", "dolly"])
def test_every_row_of_fedbiots_tables_has_its_command(task: str, drop: str, row: str) -> None:
    algorithm, more, scenario, adapter = ROWS[row]
    path = ROOT / "launch" / "recipes" / f"{algorithm}-{task}.yaml"
    wanted, _ = recipe.read(["--config", str(path), f"--offsite.drop_rate={drop}", *more], "test", "")
    config = recipe.algorithm(algorithm).SCHEME.resolve(wanted.offsite)
    assert (wanted.algorithm, wanted.scenario, config.adapter_first, config.adapter_last) == (algorithm, scenario, *adapter)
    assert (wanted.rounds, wanted.train.steps, wanted.train.batch_size, config.prealign_steps) == (500, 30, 10, 500)
    assert (wanted.train.optimizer, wanted.train.betas, wanted.peft.rank, wanted.peft.alpha) == ("adamw", (0.9, 0.95), 8, 16)
    assert (config.drop_rate, config.align_steps, config.align_batch_size, config.public_name) == (float(drop), 10, 10, "alpaca")
    words = path.read_text()
    assert all(argument.replace("=", " ") in words for argument in more)


def test_offsite_settings_ask_for_an_algorithm_that_reads_them() -> None:
    for arguments, words in (
        (["--offsite.drop_rate=0.5"], "offsite settings are given, but algorithm fedavg has none"),
        (["--algorithm=fedbiot", "--scenario=local"], "scenario local: fedbiot aligns the emulator on the server"),
        (["--algorithm=fedbiot", "--peft.method=none"], "peft.method none: algorithm fedbiot trains layers, with lora"),
        (["--algorithm=fedot", "--peft.method=prefix"], "with lora or none"),
        (["--algorithm=fedot", "--aggregation.rule=ffa"], "algorithm fedot takes the mean of adapters of one rank"),
        (["--algorithm=fedbiot", "--model.quantization=nf4"], "quantization nf4: algorithm fedbiot makes models of layers"),
        (["--compare=fedprox", "--offsite.drop_rate=0.5"], "offsite settings are given, but algorithm fedavg has none"),
        (["--compare=fedot", "--aggregation.rule=ffa"], "algorithm fedot takes the mean of adapters of one rank"),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe.read(arguments, "test", "")


UNSEEN = ["--aggregation.record_error=false"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--close_share=1"], "close_share 1.0: give a share of the updates between 0 and 1"),
        (["--close_share=0.5", "--scenario=all"], "close_share 0.5: scenario all needs every client's run"),
        (
            ["--close_share=0.5", "--exchange=sums", *UNSEEN],
            "adds updates up on their way, close_share 0.5 must see each",
        ),
        (["--bench_after=-1"], "bench_after -1: at least 0 is needed"),
        (["--bench_rounds=0"], "bench_rounds 0: at least 1 is needed"),
        (["--on_rank_lost=continue", "--scenario=local"], "on_rank_lost continue: scenario local needs every client's run"),
        (
            ["--on_rank_lost=continue", "--groups=2,1", "--train.engine=ddp"],
            "continue: clients of one rank each are left out",
        ),
        (["--on_rank_lost=continue", "--exchange=collective", *UNSEEN], "on_rank_lost continue must see each"),
        (["--on_oom=perhaps"], "train.on_oom is perhaps: it must be one of retry, fail"),
    ],
)
def test_what_a_run_with_faults_cannot_be(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.read(arguments, "test", "")


def test_what_is_compared_is_a_recipe_of_its_own() -> None:
    arguments = [
        "--scenario=all",
        "--compare=fedbiot, fedprox",
        "--offsite.drop_rate=0.5",
        "--train.steps=7",
        "--eval.overlap=true",
    ]
    wanted, _ = recipe.read(arguments, "test", "")
    assert wanted.compare == ("fedbiot", "fedprox") == recipe.read(["--compare=[fedbiot, fedprox]"], "test", "")[0].compare
    alone = [
        recipe.read([f"--algorithm={name}", "--train.steps=7", "--eval_every=0", *more], "test", "")[0]
        for name, more in (("fedbiot", ["--offsite.drop_rate=0.5"]), ("fedprox", []))
    ]
    assert [wanted.beside(name) for name in wanted.compare] == alone


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("fedot,fedot", "compare fedot, fedot: name each once"),
        ("fedavg", "and not fedavg, which is run anyway"),
        ("fedott", "algorithm 'fedott': .* it must be fedavg"),
    ],
)
def test_what_cannot_be_compared(asked: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.read([f"--compare={asked}"], "test", "")
