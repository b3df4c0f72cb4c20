"""FedOT and FedBiOT: the emulator comes over the link, once; the same bytes from every placement; two models out."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi import evaluate, generate, models
from fedmpi.algorithms import fedbiot
from fedmpi.data import toy
from fedmpi.errors import Aborted
from fedmpi.hosting import emulation
from fedmpi.models import skeleton
from fedmpi.offsite import Config as OffsiteConfig
from fedmpi.offsite.alignment import Gap
from fedmpi.settings.recipe import Recipe
from fedmpi.stop import Stop
from fedmpi.tensors import digest, num_bytes
from tests.lockstep.conftest import write_model
from tests.lockstep.ranks import STOPS, adapter, recipe, run
from tests.lockstep.test_absent import Falls

KINDS = ("fedot", "fedbiot")
LEFT = ("adapter/adapter_model.safetensors", "adapter_emu/adapter_model.safetensors", "emulator/model.safetensors")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows, so that measuring takes no time."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in toy.rows(48, 0, "train"))
    return path


@pytest.fixture
def wanted(deep_folder: Path, rows: Path) -> Any:
    """A recipe of each algorithm: sampling, dropout, kept optimisers on both sides."""

    def of(algorithm: str, *more: str) -> Recipe:
        return recipe(
            f"--algorithm={algorithm}",
            f"--model.path={deep_folder}",
            "--rounds=3",
            "--clients=4",
            "--clients_per_round=3",
            "--data.name=json",
            f"--data.path={rows}",
            "--data.splitter=iid",
            "--data.max_length=96",
            "--peft.rank=4",
            "--peft.dropout=0.1",
            "--train.steps=2",
            "--train.batch_size=2",
            "--train.lr=0.01",
            "--train.optimizer_state=keep",
            "--eval.task=none",
            "--offsite.drop_rate=0.5",
            "--offsite.prealign_steps=2",
            "--offsite.align_steps=2",
            "--offsite.align_batch_size=2",
            "--offsite.align_lr=0.01",
            *more,
        )

    return of


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def left_by(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in LEFT]


@pytest.mark.parametrize("algorithm", KINDS)
def test_every_number_of_ranks_gives_the_same_bytes(wanted: Any, tmp_path: Path, algorithm: str) -> None:
    for size in (1, 2, 4):
        assert run(wanted(algorithm), tmp_path / str(size), size) == [0] * size
    assert left_by(tmp_path / "1") == left_by(tmp_path / "2") == left_by(tmp_path / "4")
    for key in ("eval_loss", "eval_loss_emu", "train_loss", *(("prox", "align_loss") if algorithm == "fedbiot" else ())):
        told = [[line[key] for line in lines_of(tmp_path / str(size)) if key in line] for size in (1, 2, 4)]
        assert told[0] == told[1] == told[2] and len(told[0]) >= 3
        assert all(value > 0 for value in told[0])


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_stopped_run_goes_on_from_the_emulator_that_is_there(
    wanted: Any, tmp_path: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = wanted(algorithm, STOPS)
    run(given, tmp_path / "whole")
    assert run(given, tmp_path / "parts", 3, stop_rank=1, stop_turn=3) == [75] * 3
    monkeypatch.setattr(emulation, "_aligned", lambda *_: pytest.fail("aligned anew"))
    assert run(given, tmp_path / "parts", 2) == [0, 0]
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")
    events = [line["event"] for line in lines_of(tmp_path / "parts") if "event" in line]
    assert events == ["supply", "evaluation", "supply", "resume"]


@pytest.mark.parametrize("size", [1, 3])
def test_a_signal_in_the_long_alignment_before_the_rounds_is_heeded_at_once(
    wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Told before the first, and at the third of a thousand steps."""
    given, told, seen = wanted("fedbiot"), threading.Event(), []
    with monkeypatch.context() as patched:
        patched.setattr(Stop, "over", lambda self: True)
        assert run(given, tmp_path / "run", size) == [75] * size
        assert "stopped before the emulator was made" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(Stop, "wanted", lambda self: told.is_set())
        patched.setattr(Gap, "__call__", counting(Gap.__call__, seen, told.set))
        long = replace(given, offsite=replace(given.offsite, prealign_steps=1000))
        assert run(long, tmp_path / "run", size) == [75] * size
    assert len(seen) == 3 and "after step 3 of 1000 of the pre-alignment, which begins anew" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"
    assert not (tmp_path / "run" / "emulator").exists()
    assert run(given, tmp_path / "run", size) == [0] * size


def counting(call: Any, seen: list[int], at_the_third: Any) -> Any:
    def counted(*given: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            at_the_third()
        return call(*given)

    return counted


class Died(BaseException):
    """The process is gone, as far as its files can tell."""


def test_who_dies_before_the_emulator_is_whole_begins_it_anew(wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the alignment, or with the emulator half written: the next start ends in the bytes of a run left alone."""
    given = wanted("fedbiot", "--rounds=1")
    assert run(given, tmp_path / "whole") == [0]

    def die(*_: object) -> None:
        raise Died

    for owner, name in ((Gap, "__call__"), (emulation, "file_sha256")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, die)
            with pytest.raises(Died):
                run(given, tmp_path / "parts")
        assert not (tmp_path / "parts" / "emulator").exists()
    assert (tmp_path / "parts" / ".emulator").exists(), "it was half written"
    assert run(given, tmp_path / "parts") == [0]
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")
    assert not (tmp_path / "parts" / ".emulator").exists()


def test_the_run_goes_on_without_a_rank_that_is_gone(wanted: Any, tmp_path: Path) -> None:
    Falls.turns.clear()
    Falls.error = None
    hook = f"--train.hooks=[{Falls.__module__}.Falls]"
    given = wanted("fedbiot", "--clients=3", "--on_rank_lost=continue", "--timeout_s=5", hook)
    results = run(given, tmp_path, 4)
    assert [results[rank] for rank in (0, 1, 3)] == [0] * 3
    assert [line["counted"] for line in lines_of(tmp_path) if "event" not in line] == [[0, 1, 2], [0, 2], [0, 2]]


def test_a_lossy_codec_leaves_server_and_clients_with_one_emulator(wanted: Any, tmp_path: Path) -> None:
    """Both LoRA go down in 8 bits: the server aligns on from what was decoded, so placements agree."""
    given = wanted("fedbiot", "--codec_down=int8", "--codec_up=delta,int8,ef", "--rounds=2")
    for size in (1, 3):
        assert run(given, tmp_path / str(size), size) == [0] * size
    assert left_by(tmp_path / "1") == left_by(tmp_path / "3")


@pytest.mark.parametrize("size", [1, 3])
def test_nobody_but_the_server_opens_the_model(wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Ranks are threads: the opener refuses the model's folder to every thread but the server's."""
    given, opened, lock = wanted("fedbiot"), [], threading.Lock()
    server: list[int] = []

    def watched(name: str) -> Any:
        original = getattr(models.backbone, name)

        def open_(config: Any, *rest: Any) -> Any:
            if config.path == given.model.path:
                with lock:
                    opened.append(threading.get_ident())
                if opened[-1] not in server:
                    raise PermissionError(f"a client opens {config.path}")
            return original(config, *rest)

        monkeypatch.setattr(models.backbone, name, open_)
        monkeypatch.setattr(models, name, open_, raising=False)

    original = emulation.on_server
    monkeypatch.setattr(emulation, "on_server", lambda *a: (server.append(threading.get_ident()), original(*a))[1])
    watched("load_model")
    watched("load_tokenizer")
    assert run(given, tmp_path, size) == [0] * size
    assert len(server) == 1 and set(opened) == set(server)


@pytest.mark.parametrize(("algorithm", "size"), [("fedot", 1), ("fedot", 3), ("fedbiot", 6)])
def test_what_is_handed_out_is_counted(wanted: Any, tmp_path: Path, algorithm: str, size: int) -> None:
    """Files to every rank, tensors to those that have clients; alone, a copy for each client as links would carry it."""
    assert run(wanted(algorithm), tmp_path, size) == [0] * size
    emulator = models.load_model(models.Config(str(tmp_path / "emulator")))
    files = sum((tmp_path / "emulator" / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json"))
    holders, readers = (4, 4) if size == 1 else (min(4, size - 1), size - 1)
    expected = holders * num_bytes(dict(skeleton.stored(emulator))) + readers * files
    assert lines_of(tmp_path)[0] == {"round": -1, "event": "supply", "supply_bytes": expected}
    totals = json.loads((tmp_path / "summary.json").read_text())["totals"]
    assert totals["supply_bytes"] == expected


@pytest.mark.parametrize(("algorithm", "layers_down"), [("fedot", 4), ("fedbiot", 2 + 3)])
def test_a_round_carries_the_loras_that_it_should(wanted: Any, tmp_path: Path, algorithm: str, layers_down: int) -> None:
    run(wanted(algorithm), tmp_path, 4)
    of_a_layer = 4 * 2 * (4 * 16 + 16 * 4)  # fp32, query and value, A and B
    for line in (line for line in lines_of(tmp_path) if "event" not in line):
        ranks = {client % 3 for client in line["cohort"]}
        assert line["down_bytes"] == layers_down * of_a_layer * len(ranks)
        assert line["up_bytes"] == (4 if algorithm == "fedot" else 2) * of_a_layer * 3


@pytest.mark.parametrize("codec", ["raw", "delta,int8,ef"])
def test_the_emulator_of_a_client_is_the_servers_in_every_round(
    wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    held: dict[int, set[str]] = {}
    sent: dict[int, str] = {}

    def emulator_of(host: Any) -> str:
        """Everything but the adapter's LoRA, frozen layers and LoRA alike."""
        names = {name: host.split.layout.original(name) for name, _ in host.base.model.named_parameters()}
        adapters = {n for n, original in names.items() if host.split.layout.part(original) == "adapter" and "lora_" in n}
        return digest({n: p.detach() for n, p in host.base.model.named_parameters() if n not in adapters})

    update, round_ = fedbiot.client_update, fedbiot.run_round

    def watched_update(client: Any, received: Any, rnd: Any) -> Any:
        made = update(client, received, rnd)
        held.setdefault(rnd.index, set()).add(emulator_of(client.host))
        return made

    def watched_round(fed: Any, rnd: Any, server: Any, clients: Any) -> Any:
        after = round_(fed, rnd, server, clients)
        if after is not None:
            after.host.base.load(after.outgoing)
            sent[rnd.index] = emulator_of(after.host)
        return after

    monkeypatch.setattr(fedbiot, "client_update", watched_update)
    monkeypatch.setattr(fedbiot, "run_round", watched_round)
    assert run(wanted("fedbiot", f"--codec={codec}"), tmp_path, 3) == [0] * 3
    assert held == {index: {value} for index, value in sent.items()} and len(set(sent.values())) == 3


def test_one_process_holds_the_frozen_tensors_once(wanted: Any, tmp_path: Path) -> None:
    from fedmpi import data

    given = wanted("fedbiot")
    parties = data.federate(given.data, given.clients, given.seed)
    for _ in range(2):  # made, and opened again
        base, split, original, _ = emulation.outfit(given, fedbiot.SCHEME, "cpu", tmp_path, parties, None, "x")
        assert original is not None
        whole = {p.data_ptr() for p in original.base.model.parameters()}
        own = {
            split.layout.original(name)
            for name, p in base.model.named_parameters()
            if p.data_ptr() not in whole and "lora_" not in name
        }
        merged = {f"base_model.model.model.layers.{n}.self_attn.{m}_proj.base_layer.weight" for n in (0, 2, 5) for m in "qv"}
        assert own == merged  # what alignment changed, and nothing else


@pytest.mark.parametrize("algorithm", KINDS)
def test_both_models_open_with_peft_and_give_the_losses_of_the_run(
    wanted: Any, deep_folder: Path, tmp_path: Path, algorithm: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedmpi.data import federate, tokenize
    from fedmpi.evaluation import heldout_loss

    given = wanted(algorithm)
    assert run(given, tmp_path) == [0]
    rows = federate(given.data, given.clients, given.seed).heldout
    examples, _ = tokenize(rows, AutoTokenizer.from_pretrained(tmp_path / "emulator"), given.data)
    final = json.loads((tmp_path / "summary.json").read_text())["final"]
    for ending, folder in (("", deep_folder), ("_emu", tmp_path / "emulator")):
        bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(bare, tmp_path / f"adapter{ending}")
        assert heldout_loss(model, examples, given.eval.batch_size, 0).loss == final[f"eval_loss{ending}"]


def test_evaluate_and_generate_know_both_models(wanted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, both = tmp_path / "run", ("full", "emu")
    assert run(wanted("fedbiot"), run_dir) == [0]
    for which in both:
        assert evaluate.main([str(run_dir), "--task", "perplexity", "--which", which]) == 0
        assert generate.main([str(run_dir), "--prompt", "Say cat", "--which", which, "--max_new_tokens", "2"]) == 0
    final = json.loads((run_dir / "summary.json").read_text())["final"]
    parts = (run_dir / "evaluations" / "perplexity.json", run_dir / "evaluations" / "emu" / "perplexity.json")
    scores = [json.loads(path.read_text())["score"] for path in parts]
    assert scores == pytest.approx([final["eval_loss"], final["eval_loss_emu"]], rel=1e-5)
    assert scores[0] != scores[1]
    assert evaluate.main(["builtin:tiny", "--task", "perplexity", "--which", "emu"]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_local_and_global_offsite_tuning_are_the_same_wherever_they_run(
    wanted: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = wanted("fedot", "--scenario=all", "--rounds=2")
    for size in (1, 3):
        assert run(given, tmp_path / str(size), size) == [0] * size
    said = capsys.readouterr().out
    assert said.count("client 3 alone") == 2 and "loss with emulator" in said
    for part in (".", "global", "local/clients/0", "local/clients/3"):
        for name in LEFT[:2]:
            assert (tmp_path / "1" / part / name).read_bytes() == (tmp_path / "3" / part / name).read_bytes()
    alone = json.loads((tmp_path / "3" / "local/clients/0" / "summary.json").read_text())["final"]
    assert alone["eval_loss"] != alone["eval_loss_emu"]
    before = adapter(tmp_path / "3" / "local/clients/0")
    assert run(given, tmp_path / "3", 2) == [0, 0]
    assert adapter(tmp_path / "3" / "local/clients/0") == before


def test_whole_layers_can_be_trained(wanted: Any, tmp_path: Path) -> None:
    given = wanted("fedot", "--peft.method=none", "--peft.rank=8", "--peft.dropout=0")
    for size in (1, 3):
        assert run(given, tmp_path / str(size), size) == [0] * size
    assert left_by(tmp_path / "1") == left_by(tmp_path / "3")
    down = [line["down_bytes"] for line in lines_of(tmp_path / "1") if "event" not in line]
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert down == [4 * layer * 4 * 3] * 3


def test_an_emulator_of_another_run_is_taken_as_it_is(wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(wanted("fedbiot"), tmp_path / "first")
    monkeypatch.setattr(emulation, "_aligned", lambda *_: pytest.fail("aligned anew"))
    again = wanted("fedbiot", f"--offsite.emulator={tmp_path / 'first' / 'emulator'}")
    assert run(again, tmp_path / "again", 2) == [0, 0]
    assert left_by(tmp_path / "again") == left_by(tmp_path / "first")


@pytest.mark.parametrize(
    ("algorithm", "arguments", "words"),
    [
        ("fedbiot", ("--offsite.adapter_last=9",), ["adapter_last 9", "the model has 8"]),
        ("fedbiot", ("--offsite.drop_rate=0.9",), ["drop_rate 0.9", "leaves none of the 6"]),
        ("fedot", ("--offsite.public_name=json", "--offsite.public_path=empty.jsonl"), ["empty.jsonl"]),
        ("fedot", ("--offsite.emulator=nowhere",), ["nowhere", "holds no emulator"]),
        ("fedot", ("--offsite.public_name=alpacca",), ["alpacca"]),
    ],
)
def test_bad_input_ends_every_rank_with_one_line(
    wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, arguments: tuple[str, ...], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    results = run(wanted(algorithm, *arguments), tmp_path / "run", 3)
    assert all(word in str(results[0]) for word in words), results[0]
    assert all(isinstance(result, Aborted) for result in results[1:]), results


def test_a_model_without_layers_ends_every_rank_with_what_was_looked_for(wanted: Any, tmp_path: Path) -> None:
    bare = write_model(tmp_path / "bare", 0)
    results = run(replace(wanted("fedbiot"), model=models.Config(str(bare))), tmp_path / "run", 3)
    assert "LlamaForCausalLM has no list of repeated layers (a torch.nn.ModuleList)" in str(results[0]), results[0]
    assert all(isinstance(result, Aborted) for result in results[1:]), results


def test_public_rows_may_not_be_the_clients(wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"instruction": "say {i}", "output": "{i}"}}\n' for i in range(40))
    Path("theirs.jsonl").write_text(rows)
    Path("copy.jsonl").write_text(rows)
    for name, words in (("theirs.jsonl", "lies in the clients' files"), ("copy.jsonl", "is a file of the clients")):
        given = wanted(
            "fedot", "--data.path=theirs.jsonl",
            "--offsite.public_name=json", f"--offsite.public_path={name}",
        )  # fmt: skip
        with pytest.raises(Exception, match=words):
            run(given, tmp_path / "run")


def test_an_emulator_of_another_model_is_refused(wanted: Any, deep_folder: Path, tmp_path: Path) -> None:
    given = wanted("fedbiot")
    run(given, tmp_path / "first")
    other = tmp_path / "other"
    model = models.load_model(models.Config(str(deep_folder)))
    model.model.norm.weight.add_(1)
    model.save_pretrained(other)
    models.load_tokenizer(models.Config(str(deep_folder))).save_pretrained(other)
    settings: OffsiteConfig = replace(given.offsite, emulator=str(tmp_path / "first" / "emulator"))
    foreign = replace(given, model=models.Config(str(other)), offsite=settings)
    with pytest.raises(Exception, match=r"is of another model: model.norm.weight differs"):
        run(foreign, tmp_path / "second")
    with pytest.raises(Exception, match="adapters of 0 and 3"):
        run(replace(given, offsite=replace(settings, adapter_last=3)), tmp_path / "third")


LONG = [pytest.param(builder, marks=pytest.mark.slow) for builder in ("influence", "quantized", "distilled")]


@pytest.mark.parametrize("builder", ["shared", "thin", *LONG])
def test_every_builders_emulator_travels_and_is_opened_again(
    wanted: Any, tmp_path: Path, builder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process and in three the same bytes; a run that opens the stored emulator of another ends in these too, and who is
    left with the emulator alone asks it."""
    given = wanted("fedbiot", f"--offsite.builder={builder}", "--offsite.bits=4", "--rounds=2")
    for name, size in (("one", 1), ("three", 3)):
        assert set(run(given, tmp_path / name, size)) == {0}
    opened = replace(given, offsite=replace(given.offsite, emulator=str(tmp_path / "one" / "emulator")))
    assert run(opened, tmp_path / "opened") == [0]
    assert left_by(tmp_path / "one") == left_by(tmp_path / "three") == left_by(tmp_path / "opened")
    asked = [str(tmp_path / "one"), "--which", "emu"]
    assert evaluate.main([*asked, "--task", "perplexity"]) == 0
    score = json.loads((tmp_path / "one" / "evaluations" / "emu" / "perplexity.json").read_text())["score"]
    final = json.loads((tmp_path / "one" / "summary.json").read_text())["final"]
    assert score == pytest.approx(final["eval_loss_emu"], rel=1e-5) and score != pytest.approx(final["eval_loss"], rel=1e-5)
    assert generate.main([*asked, "--prompt", "Say cat", "--max_new_tokens", "2"]) == 0
    if builder in ("shared", "thin", "quantized"):  # transformers alone would make up what it does not find
        assert evaluate.main([*asked, "--task", "lm_eval:piqa"]) == 2
        assert "knows nothing of this emulator's parts" in capsys.readouterr().err
