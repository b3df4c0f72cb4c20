"""Who gets which rows: named federated sets, clients that bring their own files, one map of categories for every part."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpi import data
from fedmpi.data import __main__ as program
from fedmpi.data.declared import CORPORA, FEDERATED
from fedmpi.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real corpora: {SHARED} is missing")
LANGUAGES = CORPORA["rosetta"].categories


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rosetta(folder, languages=LANGUAGES, each=10):
    rows = [{"instruction": f"Sort {i}. " * 20, "input": name, "output": "x"} for name in languages for i in range(each)]
    write(folder / "rosetta_alpaca.json", rows)
    return {"path": str(folder)}


# ---- named federated sets ----------------------------------------------------------------------------------------------------


def test_every_named_set_stands_on_a_corpus_that_can_make_it():
    for name, fixed in FEDERATED.items():
        declared = CORPORA[fixed.corpus]
        assert name.startswith("fed-") and fixed.clients == fixed.published.clients
        assert fixed.splitter != "meta" or len(declared.categories) == fixed.clients
        assert fixed.task in ("humaneval", "helm", "gsm8k")


def test_a_named_set_fixes_splitter_and_clients(tmp_path):
    where = rosetta(tmp_path)
    federated = data.federate(data.Config(name="fed-code-alpaca", **where), None, 0)
    assert [list(share) for share in federated.client_categories] == [[name] for name in sorted(LANGUAGES)]
    assert federated.record["name"] == "fed-code-alpaca" and federated.record["corpus"] == "rosetta"
    assert data.federate(data.Config(name="fed-code-alpaca", splitter="meta", **where), 9, 0) == federated
    with pytest.raises(ConfigError, match="clients is 3, but fed-code-alpaca fixes 9: give data.name rosetta"):
        data.federate(data.Config(name="fed-code-alpaca", **where), 3, 0)
    with pytest.raises(ConfigError, match="splitter is iid, but fed-code-alpaca fixes meta: give data.name rosetta"):
        data.federate(data.Config(name="fed-code-alpaca", splitter="iid", **where), None, 0)
    assert len(data.federate(data.Config(name="rosetta", splitter="iid", **where), 3, 0).clients) == 3


def test_a_named_set_wants_its_whole_file(tmp_path):
    with pytest.raises(DataError, match="fed-code-alpaca is 9 categories, a client each, but the file has 8"):
        data.federate(data.Config(name="fed-code-alpaca", **rosetta(tmp_path, LANGUAGES[1:])), None, 0)


@real
@pytest.mark.parametrize(
    ("name", "folder", "told"),
    [
        ("fed-gsm8k-3", "gsm8k", "FedBiOT Table 1: all 5 numbers are the same"),
        ("fed-dolly", "dolly15k", "rows 15011 here, 15015 there; max 3742 here, 3611 there; min 709 here, 711 there; std 839.91"),
        ("fed-code-alpaca", "rosetta", "rows 7384 here, 7954 there; max 1469 here, 1172 there"),
    ],
)
def test_the_table_stands_beside_the_papers(name, folder, told, capsys):
    assert program.main([name, "--data.path", str(SHARED / folder)]) == 0
    printed = capsys.readouterr().out
    assert told in printed and f"{FEDERATED[name].clients} clients" in printed
    assert ("left out 56 X86 Assembly" in printed) == (name == "fed-code-alpaca")


def test_rows_that_a_paper_rounds_are_compared_as_it_rounds():
    shares = tuple({"go": rows} for rows in (1_880_853 - 5, 1, 1, 1, 1, 1))
    clients = tuple(data.ClientData(i, [None] * sum(share.values()), []) for i, share in enumerate(shares))
    federated = data.Federated(clients, [], shares, {}, "test split")
    assert program.compare(federated, FEDERATED["fed-code-search-net"].published)[1] == "FS-LLM Table 6: all 2 numbers are the same"
    few = data.Federated(clients[1:], [], shares[1:], {}, "test split")
    said = program.compare(few, FEDERATED["fed-code-search-net"].published)[1]
    assert said.endswith("of this corpus: rows 5 here, 1880800 there; clients 5 here, 6 there")


def test_the_table_counts_tokens_where_a_tokenizer_is_named(tmp_path, capsys):
    arguments = ["fed-code-alpaca", "--data.path", str(rosetta(tmp_path)["path"]), "--data.max_length", "32"]
    assert program.main([*arguments, "--model.path", "builtin:tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "9", "1", str(9 * 32), "C", "9"] and "tokens" in lines[0]
    assert f"tokens: {81 * 32} in all, max 288, min 288, std 0.00" in lines
    assert "samples cut for length: 81, of these 0 in the response; without a token to learn, dropped: 0" in lines


# ---- given ----------------------------------------------------------------------------------------------------


def sites(folder, sizes, category="x"):
    for client, size in sizes.items():
        rows = [{"instruction": f"{client} {i}", "response": "a", "category": category} for i in range(size)]
        write(folder / f"{client}.jsonl", rows)
    return data.Config(name="json", splitter="given", path=f"{folder}/{{client}}.jsonl")


def test_each_client_brings_its_own_file(tmp_path):
    federated = data.federate(sites(tmp_path, {0: 20, 1: 5, 2: 10}), 3, 0)
    assert [len(client.train) for client in federated.clients] == [18, 4, 9]
    assert all(row.instruction.startswith(f"{c.id} ") for c in federated.clients for row in [*c.train, *c.heldout])
    ids = [row.id for client in federated.clients for row in [*client.train, *client.heldout]]
    assert len(set(ids)) == 35
    assert federated.record["splitter"] == "given" and federated.sites[1]["name"] == "1.jsonl"
    assert str(tmp_path) not in json.dumps([federated.record, dict(federated.sites)])


def test_only_the_wanted_files_are_opened(tmp_path):
    config = sites(tmp_path, {1: 20, 4: 10})  # the others are not on this machine at all
    federated = data.federate(config, 6, 0, only=(4, 1))
    assert [len(client.train) for client in federated.clients] == [0, 18, 0, 0, 9, 0]
    assert list(federated.sites) == [1, 4]
    nobody = data.federate(config, 6, 0, only=())
    assert [client.train for client in nobody.clients] == [[]] * 6 and nobody.heldout == []
    assert nobody.record == federated.record  # ranks that see other files are of one experiment all the same
    with pytest.raises(DataError, match=r"0\.jsonl is neither a file nor a folder"):
        data.federate(config, 6, 0)


def test_what_a_client_holds_out_does_not_depend_on_who_else_is_opened(tmp_path):
    config = sites(tmp_path, {0: 20, 1: 20})
    assert data.federate(config, 2, 0).clients[1] == data.federate(config, 2, 0, only=[1]).clients[1]


def test_a_folder_per_client_may_bring_a_test_part(tmp_path):
    for client in (0, 1):
        rows = [{"instruction": "q", "response": "a"}] * 4
        write(tmp_path / str(client) / "train.jsonl", rows)
        write(tmp_path / str(client) / "test.jsonl", rows[: client + 1])
    config = data.Config(name="json", splitter="given", path=f"{tmp_path}/{{client}}")
    assert [len(client.heldout) for client in data.federate(config, 2, 0).clients] == [1, 2]


def test_held_out_rows_may_be_in_a_file_that_is_nobodys(tmp_path):
    config = sites(tmp_path, {0: 20, 1: 5, "heldout": 7})
    federated = data.federate(config, 2, 0, only=())
    assert [row.id for row in federated.heldout] == [f"heldout:train:{i}" for i in range(7)]
    assert federated.heldout_from == "7 rows in a file of their own"
    assert len(data.federate(config, 2, 0).heldout) == 7
    assert data.federate(config, 2, 0, only=[1], measures=False).heldout == []


def test_without_such_a_file_held_out_rows_stay_with_their_clients(tmp_path):
    federated = data.federate(sites(tmp_path, {0: 20, 1: 5}), 2, 0)
    assert federated.heldout == [] and [len(client.heldout) for client in federated.clients] == [2, 1]


def test_the_record_is_completed_by_what_the_clients_ranks_tell(tmp_path):
    config = sites(tmp_path, {0: 20, 1: 5})
    samples = {"rows": 3, "tokens": 30, "cut": 1, "cut_responses": 0, "dropped": 2}
    apart = [data.federate(config, 2, 0, only=[client]) for client in (0, 1)]
    told = {client: {**one.sites[client], "samples": samples} for client, one in enumerate(apart)}
    record = data.federate(config, 2, 0, only=()).known(told)
    assert (record["train_rows"], record["heldout_rows"], record["samples"]["dropped"]) == ([18, 4], [2, 1], [2, 2])
    whole = data.federate(config, 2, 0)
    assert record == whole.known({client: {**whole.sites[client], "samples": samples} for client in (0, 1)})


def test_given_says_what_it_needs(tmp_path):
    config = sites(tmp_path, {0: 5})
    for changed, clients, words in [
        ({}, None, "needs --clients N"),
        ({"path": "rows.jsonl"}, 1, "needs a place for the client, as in site/{client}.jsonl"),
        ({"name": "fed-dolly"}, 1, "takes each client's file as it is"),
        ({"num_rows": 3}, 1, "takes each client's file as it is"),
    ]:
        with pytest.raises(ConfigError, match=words):
            data.federate(data.Config(**{**vars(config), **changed}), clients, 0)


# ---- one map for every part ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    categories=st.lists(st.sampled_from("abcde"), min_size=40, max_size=80),
    tests=st.integers(0, 30),
    clients=st.integers(1, 4),
    splitter=st.sampled_from(["iid", "meta", "dirichlet", "shards", "unequal_shards", "quantity", "root_verb"]),
)
def test_no_row_is_lost_shared_or_both_trained_on_and_held_out(tmp_path, categories, tests, clients, splitter):
    rows = [{"instruction": f"{name}{name} {i}", "response": "r", "category": name} for i, name in enumerate(categories)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:tests]) if tests else (tmp_path / "test.jsonl").unlink(missing_ok=True)
    config = data.Config(name="json", path=str(tmp_path), splitter=splitter, alpha=5.0)
    try:
        federated = data.federate(config, clients, 0)
    except DataError as error:
        assert "cannot be dealt whole" in str(error) or "gets no rows" in str(error)
        return
    trained = [row.id for client in federated.clients for row in client.train]
    held = [row.id for client in federated.clients for row in client.heldout]
    assert len({*trained, *held}) == len(trained) + len(held) == len(categories) + tests
    assert sorted(held) == sorted(row.id for row in federated.heldout)
    for client, share in zip(federated.clients, federated.client_categories, strict=True):
        assert sum(share.values()) == len(client.train) > 0
        if splitter != "root_verb":
            assert share == Counter(row.category for row in client.train)
            assert {row.category for row in client.heldout} <= share.keys() or not tests
    assert federated.record["client_categories"] == list(federated.client_categories)


def test_a_client_without_test_rows_is_fine_and_said(tmp_path):
    rows = [{"instruction": "q", "response": "a", "category": name} for name in "ab" for _ in range(4)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:2])
    federated = data.federate(data.Config(name="json", path=str(tmp_path), splitter="meta"), 2, 0)
    assert [len(client.heldout) for client in federated.clients] == [2, 0]
    assert federated.heldout_from == "test split; 1 clients have none of it"


def test_the_options_of_a_splitter_are_on_record(tmp_path):
    where = rosetta(tmp_path)
    for splitter, options in {"iid": [], "shards": ["shards"], "quantity": ["alpha", "min_rows"]}.items():
        record = data.federate(data.Config(name="rosetta", splitter=splitter, **where), 4, 0).record
        assert list(record["splitter_options"]) == options and record["splitter"] == splitter
