"""The program: a run folder is all it needs, results are whole, an interruption is gone on from, faults are one line."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from evaluation_data import Oracle

from fedmpi import config, data, evaluate, models
from fedmpi.errors import CheckpointError
from fedmpi.evaluation import heldout_loss
from fedmpi.evaluation.task import Options
from fedmpi.evaluation.tasks import Subject, build
from fedmpi.federation import shards
from fedmpi.federation.post import Post
from fedmpi.result import Result, answered
from fedmpi.settings.recipe import Recipe
from fedmpi.target import default_task
from fedmpi.transports import in_process


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What a finished run leaves: its configuration and an adapter that does something."""
    folder = tmp_path_factory.mktemp("run")
    recipe = Recipe(clients=5, data=data.Config(num_rows=60, max_length=64))
    (folder / "config.yaml").write_text(config.to_yaml(recipe.settings()))
    model = models.add_adapter(models.load_model(recipe.model), recipe.peft, 0)
    tensors = {name: tensor + 0.02 for name, tensor in models.trainable(model).items()}
    models.save_adapter(model, tensors, folder / "adapter")
    return folder


def evaluated(run_dir: Path, out: Path, *more: str) -> dict:
    assert evaluate.main([str(run_dir), "--task", "perplexity", "--rows", "40", "--out", str(out), *more]) == 0
    return json.loads((out / "perplexity.json").read_text())


def test_perplexity_is_the_heldout_loss_of_the_adapted_model(run_dir, tmp_path):
    found = evaluated(run_dir, tmp_path)
    recipe = Recipe(clients=5, data=data.Config(num_rows=60, max_length=64))
    model = models.add_adapter(models.load_model(recipe.model), recipe.peft, 0)
    models.load_trainable(model, {name: tensor + 0.02 for name, tensor in models.trainable(model).items()})
    parties = data.federate(recipe.data, 5, 0)
    chosen = {record["id"] for record in found["records"]}
    rows = [row for row in parties.heldout if row.id in chosen]
    tokenizer = models.load_tokenizer(recipe.model)
    score = heldout_loss(model, data.tokenize(rows, tokenizer, recipe.data)[0], 8, 0)
    assert found["score"] == pytest.approx(score.loss, rel=1e-5) and found["num_tokens"] == score.num_tokens
    assert found["interval"]["low"] < found["score"] < found["interval"]["high"]
    for client in parties.clients:
        mine = [row for row in rows if row.id in {row.id for row in client.heldout}]
        if mine:
            own = heldout_loss(model, data.tokenize(mine, tokenizer, recipe.data)[0], 8, 0)
            assert found["clients"][str(client.id)]["loss"] == pytest.approx(own.loss, rel=1e-5)
    worst = found["worst_client"]
    assert worst["loss"] == max(client["loss"] for client in found["clients"].values())
    assert not list(tmp_path.glob("*.jsonl"))
    told = {"subject", "prompt_hash", "shots", "decoding", "rows", "template", "template_hash", "max_length", "counts"}
    assert found["settings"].keys() == told and found["versions"].keys() >= {"fedmpi", "torch", "transformers"}
    assert found["settings"]["subject"]["model"] == "builtin:tiny" and len(found["settings"]["subject"]["adapter_sha256"]) == 64


def test_an_interrupted_evaluation_goes_on(run_dir, tmp_path, monkeypatch):
    whole = evaluated(run_dir, tmp_path / "whole", "--batch_size", "2")
    asked = []
    from fedmpi.evaluation.speaker import ModelSpeaker

    measure = ModelSpeaker.measure

    def breaking(self, examples):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(examples))
        return measure(self, examples)

    monkeypatch.setattr(ModelSpeaker, "measure", breaking)
    again = [str(run_dir), "--task", "perplexity", "--rows", "40", "--out", str(tmp_path / "two"), "--batch_size", "2"]
    assert evaluate.main(again) == 130
    part = tmp_path / "two" / "perplexity.jsonl"
    assert not (tmp_path / "two" / "perplexity.json").exists() and len(part.read_text().splitlines()) == 1 + 3
    part.write_text(part.read_text() + '{"first": 24, "records": [{"id": "cut sho')
    monkeypatch.setattr(ModelSpeaker, "measure", measure)
    found = evaluated(run_dir, tmp_path / "two", "--batch_size", "2")
    assert found["asked_now"] == len(found["records"]) - 24 and found["records"] == whole["records"]
    assert {key for key in whole if found[key] != whole[key]} == {"seconds", "model_seconds", "asked_now"}
    assert not part.exists()


def begun(tmp_path) -> tuple[Result, dict[str, str]]:
    """An evaluation of 40 rows that was left after two chunks of 8, and the right answers."""
    task = build(Subject(Options("exact_match", rows=40), None, data.Config(num_rows=50), 5, 0))
    result, golds = Result(tmp_path, "exact_match", {}, task), {row.id: row.output for row in task.heldout.rows}
    result._known({})
    result._ask(Counting(golds), [list(range(first, first + 8)) for first in (0, 8)], None)
    return result, golds


@pytest.mark.parametrize("damage", [b"{}x\n", b"\xff\xfe\n", b"[]\n", b'{"first": 0}\n'])
def test_a_damaged_line_is_named_and_without_its_file_all_is_asked_anew(damage, tmp_path):
    result, golds = begun(tmp_path)
    lines = result.part.read_bytes().splitlines(keepends=True)
    result.part.write_bytes(b"".join([lines[0], damage, lines[2]]))
    with pytest.raises(CheckpointError, match=r"exact_match.jsonl, line 2: .*; remove the file, and the same command asks every"):
        result.make(Counting(golds), 8)
    result.part.unlink()
    again = Counting(golds)
    assert result.make(again, 8)["score"] == 1.0 and again.asked == list(result.task.ids)
    result.path.write_text("{")
    with pytest.raises(CheckpointError, match="exact_match.json is not JSON .*: give --again to discard it"):
        result.finished()


def test_a_second_evaluation_of_the_same_is_refused_until_the_first_is_gone(run_dir, tmp_path, capsys, monkeypatch):
    """However the first one ends: its process is killed. What another ends before the lock is got is not asked again."""
    code = f"""
import pathlib, fedmpi.result
lock = fedmpi.result.Result(pathlib.Path({str(tmp_path)!r}), "perplexity", {{}}, None).held()
print(input("held\\n"))"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1)
    assert first.stdout.readline() == b"held\n"
    again = [str(run_dir), "--task", "perplexity", "--rows", "4", "--out", str(tmp_path)]
    assert evaluate.main(again) == 2
    said = capsys.readouterr().err
    assert f"perplexity.json is in use by another process (process {first.pid} on " in said and len(said.splitlines()) == 1
    assert evaluate.main([*again[:2], "exact_match", *again[3:]]) == 0
    first.kill()
    first.wait()
    first.stdin.close(), first.stdout.close()
    assert evaluate.main(again) == 0
    path, held = tmp_path / "perplexity.json", Result.held
    made = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(Result, "held", lambda result: [path.write_bytes(made), held(result)][1])
    assert evaluate.main(again) == 0 and path.read_bytes() == made


def test_what_was_asked_in_other_batches_is_asked_again(tmp_path, capsys):
    """Half of the questions in chunks of 8, then all in chunks of 20: no result is made of both."""
    result, golds = begun(tmp_path)
    task, second, third = result.task, Counting(golds), Counting(golds)
    found = result.make(second, 20)
    assert second.asked == list(task.ids) and (found["asked_now"], found["prompts_cut"], found["score"]) == (40, 2, 1.0)
    assert "batches of another size" in capsys.readouterr().out
    result._known({})
    result._ask(third, [list(range(20))], None)
    found = result.make(third, 20)
    assert third.asked == list(task.ids) and (found["asked_now"], found["prompts_cut"]) == (20, 2)


def test_a_result_is_kept_for_its_own_settings_only(run_dir, tmp_path, capsys):
    first = evaluated(run_dir, tmp_path)
    assert evaluated(run_dir, tmp_path) == first
    assert evaluate.main([str(run_dir), "--task", "perplexity", "--rows", "7", "--out", str(tmp_path)]) == 2
    assert "prompt_hash" in (said := capsys.readouterr().err) and "--again" in said and len(said.splitlines()) == 1
    assert len(evaluated(run_dir, tmp_path, "--again", "--rows", "7")["records"]) == 7


def test_a_file_of_ones_own_can_be_scored(run_dir, tmp_path):
    rows = [{"instruction": "Say", "output": "yes"}, {"instruction": "Say more", "output": "no"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluated(run_dir, tmp_path, "--data", str(tmp_path / "own.jsonl"))
    assert found["num_rows"] == 2 and found["clients"] == {} and found["worst_client"] is None


@pytest.mark.parametrize("right", [True, False])
def test_an_oracle_scores_one_and_its_opposite_nothing(right, tmp_path):
    task = build(Subject(Options("exact_match"), None, data.Config(num_rows=50), 5, 0))
    oracle = Oracle({row.id: row.output for row in task.heldout.rows}, right)
    found = Result(tmp_path, "exact_match", {}, task).make(oracle, 100)
    assert found["score"] == float(right) and len(found["records"]) == 512
    assert {share["score"] for share in found["clients"].values()} == {float(right)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["builtin:tiny", "--task", "nonsense"], "'nonsense' is not known; there are"),
        (["builtin:tiny", "--task", "perplexity", "--rows", "0"], "--rows is 0: it must be at least 1"),
        (["./nowhere", "--task", "perplexity"], "./nowhere is no folder"),
        (["builtin:tiny", "--task", "perplexity", "--data", "nowhere.jsonl"], "nowhere.jsonl is neither a file nor a folder"),
        (["builtin:tiny", "--task", "exact_match", "--max_new_tokens", "5000"], "max_new_tokens 5000 leaves"),
    ],
)
def test_faults_are_one_line_and_leave_nothing_behind(arguments, expected, tmp_path, capsys):
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out")]) in (1, 2)
    said = capsys.readouterr().err
    assert expected in said and len(said.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_that_has_not_finished_is_told(run_dir, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert evaluate.main([str(tmp_path), "--task", "perplexity"]) == 2
    assert "has not finished" in capsys.readouterr().err
    (tmp_path / "clients" / "0" / "adapter").mkdir(parents=True)
    assert evaluate.main([str(tmp_path), "--task", "perplexity"]) == 2
    assert "holds 1 clients trained alone: give one of them, such as" in capsys.readouterr().err


def test_a_data_set_brings_its_task():
    found = {name: default_task(name) for name in (*data.FEDERATED, "gsm8k", "builtin:toy", "json")}
    assert found == {
        **{"fed-code-alpaca": "humaneval", "fed-dolly": "helm", "fed-gsm8k-3": "gsm8k", "fed-code-search-net": "humaneval"},
        **{"gsm8k": "gsm8k", "builtin:toy": "exact_match", "json": "perplexity"},
    }


def test_the_task_of_the_runs_data_is_asked_where_none_is_named(run_dir, tmp_path):
    assert evaluate.main([str(run_dir), "--rows", "4", "--max_new_tokens", "2", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".exact_match.lock", "exact_match.json"]


class Counting(Oracle):
    """Answers, and remembers which questions it got."""

    def __init__(self, golds):
        super().__init__(golds)
        self.asked, self.cut = [], 0

    def say(self, prompts, decoding, keys, limits=()):
        self.asked += keys
        self.cut += 1
        return super().say(prompts, decoding, keys, limits)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_chunks_and_rank_0_keeps_all_answers(size, tmp_path):
    task = build(Subject(Options("exact_match", rows=50), None, data.Config(num_rows=50), 5, 0))
    golds = {row.id: row.output for row in task.heldout.rows}
    speakers = [Counting(golds) for _ in range(size)]
    transports = in_process.open_all(size, timeout_s=20.0)
    found = []

    def rank(number):
        with transports[number] as transport, transport.turn:
            if number:
                shards.help_out(Post(transport), lambda chunk: answered(task, speakers[number], chunk))
            else:
                post = Post(transport) if size > 1 else None
                found.append(Result(tmp_path, "exact_match", {}, task).make(speakers[0], 8, post))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record["id"] for record in found[0]["records"]] == list(task.ids) and found[0]["score"] == 1.0
    chunks = [list(task.ids[start : start + 8]) for start in range(0, 50, 8)]
    for number, speaker in enumerate(speakers):
        assert speaker.asked == [name for chunk in chunks[number::size] for name in chunk]
    assert (found[0]["ranks"], found[0]["prompts_cut"], found[0]["asked_now"]) == (size, len(chunks), 50)
