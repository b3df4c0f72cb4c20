"""Bad input: one clear line that says what was found and what to do, an exit code above 0, nothing overwritten."""

import os
import resource
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fedmpi import run
from fedmpi.command import guarded
from fedmpi.errors import Aborted, CheckpointError, ConfigError, ended
from fedmpi.models import adapters
from fedmpi.record import checkpoint
from fedmpi.record.folder import RunFolder
from tests.lockstep import ranks

GIVEN = ("--data.name=json", "--data.path=site-{client}.jsonl", "--data.splitter=given", "--data.num_rows=null")
BROKEN = '{"instruction": "a", "output": "b"}\n{"instruction": \n'


@pytest.fixture
def said(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the program with more arguments; gives exit code and what it said on stderr."""

    def go(*arguments: str, **environment: str) -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = run.main([*settings, f"--run_dir={tmp_path / 'run'}", *arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedmpi:")]
        assert len(lines) == 1, lines
        return code, lines[0]

    return go


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--round=3",), ["round"]),
        (("--train.learning_rate=1",), ["train.learning_rate"]),
        (("--rounds=three",), ["rounds", "three"]),
        (("--rounds=0",), ["rounds 0", "at least 1"]),
        (("--train.lr=-1",), ["train.lr", "-1"]),
        (("--scenario=both",), ["scenario", "both", "local"]),
        (("--clients=0",), ["clients 0", "at least 1"]),
        (("--clients_per_round=10",), ["clients_per_round 10 of 9", "at most 9"]),
        (("--sampling=best",), ["sampling 'best'", "uniform"]),
        (("--algorithm=fedbest",), ["fedbest", "fedavg"]),
        (("--config=nowhere.yaml",), ["nowhere.yaml"]),
        (("--timeout_s=0",), ["timeout_s"]),
        (("--timeout_s=.inf",), ["timeout_s inf", "a week"]),
        (("--ranks_per_client=2",), ["train.engine ddp"]),
        (("--train.engine=ddp",), ["train.engine ddp", "ranks_per_client or groups"]),
        (("--ranks_per_client=2", "--train.engine=ddp"), ["groups [2] take 2 ranks", "start 3 ranks"]),
        (("--device=cuda",), ["GPU"]),
        (("--min_clients=6",), ["min_clients 6 of a cohort of 5"]),
        (("--sampling=all",), ["sampling all", "clients_per_round 5"]),
        (("--early_stop=1", "--eval_every=0"), ["early_stop 1", "eval_every"]),
        (("--train.hooks=no.Such",), ["no.Such"]),
        (("--algorithm=",), ["algorithm ''", "fedavg"]),
        (("--groups=4,two", "--train.engine=ddp"), ["groups '4,two'", "4,2,1"]),
        (("--algorithm=os.path",), ["os.path", "build_client"]),
        (("--aggregation.rule=best",), ["aggregation.rule", "best", "fedex"]),
        (("--aggregation.rule=fedex", "--peft.method=prefix", "--peft.dropout=0"), ["rule fedex", "peft.method is prefix"]),
        (("--aggregation.rule=ffa", "--peft.method=none", "--peft.dropout=0"), ["rule ffa", "peft.method is none"]),
        (("--aggregation.rule=flora", "--peft.dora=true"), ["rule flora", "peft.dora"]),
        (("--aggregation.robust=krum",), ["robust krum", "weights is examples", "weights equal"]),
        (("--aggregation.robust=krum", "--aggregation.rule=flora"), ["robust krum", "rule flora"]),
        (("--aggregation.robust=krum", "--weights=equal", "--peft.client_ranks=4,8"), ["robust krum", "peft.client_ranks"]),
        (("--aggregation.most_norm=-2",), ["aggregation.most_norm is -2"]),
        (("--aggregation.hostile=0.5",), ["aggregation.hostile is 0.5"]),
        (("--server_optimizer=adam", "--aggregation.rule=fedex"), ["server_optimizer adam", "rule fedex"]),
        (("--server_optimizer=sgd",), ["server_optimizer", "sgd", "adam"]),
        (("--server.lr=0.1",), ["server.", "server_optimizer"]),
        (("--train.precision=half",), ["train.precision half", "float32", "model.dtype float16 or bfloat16"]),
        (("--train.optimizer=paged_adamw",), ["train.optimizer paged_adamw", "no GPU"]),
        (("--peft.client_ranks=4,16",), ["peft.client_ranks has 16", "peft.rank, 8"]),
        (("--peft.client_ranks=4,two",), ["peft.client_ranks", "4,two"]),
    ],
)
def test_settings(said, arguments: tuple[str, ...], words: list[str]) -> None:
    code, line = said(*arguments)
    assert code == 2
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("round: 3", ["'round'", "did you mean --rounds?"]),
        ("train: {stepz: 1}", ["'train'", "'stepz'", "did you mean --train.steps?"]),
        ("train: {lr: high}", ["train.lr", "high"]),
        ("- 3", ["Unexpected config", "- 3"]),
    ],
)
def test_keys_of_a_recipe(said, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    code, line = said(f"--config={tmp_path / 'recipe.yaml'}")
    assert code == 2 and all(word in line for word in words), line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_with_a_broken_file(said, model_folder: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / name).write_bytes(b"\xff{")
    code, line = said(f"--model.path={broken}")
    assert code == 2 and str(broken) in line and "cannot be" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model.path=./nowhere/model",), ["nowhere/model"]),
        (("--data.name=json", "--data.path=nowhere.jsonl"), ["nowhere.jsonl"]),
        (("--data.name=json", "--data.path=broken.jsonl"), ["broken.jsonl", "line 2"]),
        (("--data.name=json", "--data.path=empty.jsonl"), ["empty.jsonl"]),
        (("--data.name=json", "--data.path=bytes.jsonl"), ["bytes.jsonl line 1", "UTF-8"]),
        (("--data.name=json", "--data.path=folder.jsonl"), ["folder.jsonl"]),
        (("--clients=500",), ["120 rows for 500 clients", "fewer clients"]),
        ((*GIVEN, "--clients=2", "--clients_per_round=2"), ["site-1.jsonl", "no records"]),
        (("--peft.target_modules=[knee_proj]",), ["knee_proj", "q_proj"]),
    ],
)
def test_files_and_models(said, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text(BROKEN)
    Path("empty.jsonl").write_text("")
    Path("bytes.jsonl").write_bytes(b"\xff\xfe")
    Path("folder.jsonl").mkdir()
    Path("site-0.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    Path("site-1.jsonl").write_text("")
    code, line = said(*arguments)
    assert code == 2
    assert all(word in line for word in words), line


def test_what_is_not_possible_is_so_on_every_rank(settings: list[str], tmp_path: Path, monkeypatch) -> None:
    """A model that is nowhere, which all miss, and a client's own file, which only its rank could have opened."""
    monkeypatch.chdir(tmp_path)
    Path("site-0.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 20)
    for arguments in (("--model.path=./nowhere/model",), (*GIVEN, "--clients=2", "--clients_per_round=2")):
        results = ranks.run(ranks.recipe(*settings, *arguments), tmp_path / "run", 3)
        assert [guarded(partial(throw, error), "") for error in results] == [2, 2, 2], results
    assert isinstance(results[1], Aborted) and "site-1.jsonl" in str(results[1])
    assert guarded(partial(throw, Aborted(ended(1, CheckpointError("ModelError: full")))), "") == 1


def throw(error: Exception) -> int:
    raise error


def test_a_start_that_failed_over_a_path_can_be_corrected(said, settings: list[str], tmp_path: Path) -> None:
    """The same --run_dir, first with a model that is not there, then with rows that are not there, then right."""
    assert said("--model.path=./nowhere/model")[0] == 2
    assert said("--data.name=json", "--data.path=nowhere.jsonl", "--resume=never")[0] == 2
    assert run.main([*settings, f"--run_dir={tmp_path / 'run'}", "--resume=never"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", b"", ["summary.json", "not JSON"]),
        ("metrics.jsonl", b"\xff\xfe\n", ["metrics.jsonl, line 1", "not JSON"]),
        ("metrics.jsonl", b"5\n{}\n", ["metrics.jsonl, line 1", "an object is expected, found 5"]),
        ("metrics.jsonl", b"{}\n", ["metrics.jsonl, line 1", "round number"]),
        ("record.json", b"[]", ["record.json", "cannot be read"]),
    ],
)
def test_a_file_of_the_run_that_is_broken(
    said, settings: list[str], tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    assert run.main([*settings, f"--run_dir={tmp_path / 'run'}"]) == 0
    (tmp_path / "run" / name).write_bytes(content)
    code, line = said()
    assert code == 1 and all(word in line for word in words), line
    assert (tmp_path / "run" / name).read_bytes() == content


def test_a_folder_that_cannot_be_made(said, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        code, line = said(f"--run_dir={folder}")
        assert code == 2 and "cannot be used" in line and str(folder) in line


def test_a_recipe_with_a_character_that_no_path_takes(said, tmp_path: Path) -> None:
    (tmp_path / "nul.yaml").write_text('data: {path: "rows\\0.jsonl"}\n')
    code, line = said(f"--config={tmp_path / 'nul.yaml'}")
    assert code == 2 and "path" in line and "NUL" in line


def test_a_folder_in_use(said, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunFolder(tmp_path / "run", "other", 2).lock():
        code, line = said()
    assert code == 2 and f"in use by another run (process {os.getpid()} on " in line


def test_a_lock_on_a_full_disk_is_held_without_a_name(tmp_path: Path) -> None:
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, room[1]))
    try:
        with RunFolder(tmp_path, "mine", 2).lock(), pytest.raises(ConfigError, match="in use by another run: wait"):
            RunFolder(tmp_path, "other", 2).lock()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)


@pytest.mark.parametrize("arguments", [("--train.precision=half",), ("--train.optimizer=paged_adamw",)])
def test_a_server_beside_its_clients_is_no_place_to_train(settings: list[str], arguments: tuple[str, ...]) -> None:
    """What the clients' machines can do, it need not; where it aligns an emulator, it must."""
    wanted = ranks.recipe(*settings, *arguments)
    ranks.program(wanted, 0, 2)._check()
    for other, rank, size in ((wanted, 1, 2), (wanted, 0, 1), (replace(wanted, compare=("fedbiot",)), 0, 2)):
        with pytest.raises(ConfigError, match=arguments[0][2:].replace("=", " ")):
            ranks.program(other, rank, size)._check()


def test_two_launchers_at_once(said) -> None:
    code, line = said(
        RANK="0", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="x", MASTER_ADDR="localhost", MASTER_PORT="1",
        OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2",
    )  # fmt: skip
    assert code == 2 and "--transport" in line and "OMPI" in line


def test_a_folder_of_another_configuration_is_left_alone(said, settings: list[str], tmp_path: Path) -> None:
    assert run.main([*settings, f"--run_dir={tmp_path / 'run'}"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, line = said("--seed=7")
    assert code == 2 and "belongs to experiment" in line and "--run_dir" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_other_rows_than_the_run_began_with(said, settings: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    own = ["--data.name=json", f"--data.path={rows}", "--data.splitter=iid", "--data.num_rows=null"]
    rows.write_text("".join(f'{{"instruction": "say {i}", "output": "{i}"}}\n' for i in range(40)))
    assert run.main([*settings, *own, f"--run_dir={tmp_path / 'run'}"]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    rows.write_text(rows.read_text().replace("say 7", "say seven"))
    code, line = said(*own)
    assert code == 1 and "began with other data" in line and "rows.jsonl" not in line.split("(")[0]


def test_no_tokenizer(said, model_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model_folder / name).read_bytes())
    code, line = said(f"--model.path={bare}")
    assert code == 2 and "tokenizer" in line and "bare" in line


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "summary.json", "metrics.jsonl", "config.yaml"])
def test_a_disk_that_is_full_outside_the_checkpoints(said, settings: list[str], tmp_path: Path, monkeypatch, name: str) -> None:
    """Whatever file it is, the run says so in one line, and started again with more room it ends as if nothing had been."""
    real_open = Path.open

    def full(path: Path, mode: str = "r", *rest: object, **more: object):
        if path.name.lstrip(".") == name and mode[0] in "aw":
            raise OSError(28, "No space left on device")
        return real_open(path, mode, *rest, **more)

    def unsaved(tensors, path: Path, *rest: object, **more: object) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        saving(tensors, path, *rest, **more)

    saving = adapters.save_file
    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(adapters, "save_file", unsaved)
    code, line = said()
    assert code == 1 and name.split("_")[0] in line and "No space left" in line and "make room" in line
    monkeypatch.setattr(adapters, "save_file", saving)
    monkeypatch.setattr(Path, "open", real_open)
    assert run.main([*settings, f"--run_dir={tmp_path / 'run'}"]) == 0
    assert run.main([*settings, f"--run_dir={tmp_path / 'whole'}"]) == 0
    assert ranks.adapter(tmp_path / "run") == ranks.adapter(tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_on_one_rank_ends_all_of_them(settings: list[str], tmp_path: Path, monkeypatch, rank: int) -> None:
    """The disk fills up where the server commits, or where a client keeps its state."""

    def full(tensors, path, *rest) -> None:
        if (".client-1" if rank == 2 else "state.safetensors") in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, *rest)

    original = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", full)
    wanted = ranks.recipe(*settings, "--train.optimizer_state=keep", "--clients_per_round=9")
    results = ranks.run(wanted, tmp_path / "run", 4)
    assert isinstance(results[rank], CheckpointError) and "make room" in str(results[rank])
    others = [result for number, result in enumerate(results) if number != rank]
    assert all(isinstance(result, Aborted) and "No space left" in str(result) for result in others), others
    monkeypatch.setattr(checkpoint, "save_file", original)
    assert ranks.run(wanted, tmp_path / "run", 4) == [0] * 4
    ranks.run(wanted, tmp_path / "whole")
    assert ranks.adapter(tmp_path / "run") == ranks.adapter(tmp_path / "whole")
