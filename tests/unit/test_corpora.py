"""Corpora and their clients: what is read, what is refused and in which words, and who holds which rows out."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmpi import data
from fedmpi.data import __main__ as program
from fedmpi.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real corpora: {SHARED} is missing")


def write(path, rows, compress=False):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def samples(num, **more):
    return [{"instruction": f"do {i}", "context": f"with {i}", "response": f"done {i}", **more} for i in range(num)]


def dolly(num_per_category=30, categories=("a", "b", "c")):
    return [row for name in categories for row in samples(num_per_category, category=name)]


def load(path, **more):
    return data.load(data.Config(name="json", path=str(path), **more), seed=0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz"])
def test_reads_lines_plain_and_compressed(tmp_path, name):
    corpus = load(write(tmp_path / name, samples(3), compress=name.endswith(".gz")))
    assert corpus.train[2] == data.Row("do 2", "with 2", "done 2", "", "train:2")
    assert corpus.test == []


def test_reads_an_array_and_a_byte_order_mark(tmp_path):
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(samples(2), indent=1).encode())
    assert [row.output for row in load(tmp_path / "rows.json").train] == ["done 0", "done 1"]


def test_usual_names_input_and_output(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"instruction": "i", "input": None, "output": 7}])
    assert load(path).train == [data.Row("i", "", "7", "", "train:0")]


@pytest.mark.parametrize("fields", ["instruction=q,response=a,input=c,category=lang", None])
def test_fields_are_mapped(tmp_path, fields):
    path = write(tmp_path / "rows.jsonl", [{"q": "Q", "a": "A", "c": "C", "lang": "L"}, {"q": "R", "a": "B", "lang": "M"}])
    wanted = fields or {"instruction": "q", "response": "a", "input": "c", "category": "lang"}
    rows = load(path, fields=wanted).train
    assert rows == [data.Row("Q", "C", "A", "L", "train:0"), data.Row("R", "", "B", "M", "train:1")]


def test_fields_from_the_command_line(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"q": f"Q{i}", "a": "A"} for i in range(6)])
    options = ["json", "--data.path", str(path), "--data.fields", "instruction=q,response=a", "--clients", "2"]
    assert program.main(options) == 0
    printed = capsys.readouterr().out
    assert "2 clients, 4 training rows, 2 held out" in printed and "max 2, min 2, mean 2.0, std 0.00" in printed


def test_program_prints_one_line_for_what_it_refuses(capsys):
    assert program.main(["gsm8k"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "data.path" in captured.err


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{"instruction": "a", "response": "b"}\n{"instruction": "a", "resp\n', "line 2 is not JSON"),
        (b'{"instruction": "a", "response": "b"}\n\n[1]\n', "line 3 is not a JSON object"),
        (b'{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n', "line 2 has no response"),
        (b'{"instruction": "a", "response": null}\n', "line 1 has no response"),
        (b'{"instruction": "a", "response": ["b"]}\n', "line 1 has a list as its response"),
        (b'{"instruction": "a", "response": "\\ud800"}\n', "line 1 has half a surrogate pair in its response"),
        (b'{"instruction": "a", "response": "b"}\n{"instruction": "\xe9", "response": "b"}\n', "line 2 is not UTF-8"),
        (b'[{"instruction": "a", "response": "b"},\n {"instruction": "a" "response": "b"}]', "line 2 is not JSON"),
        (b'[{"instruction": "a", "response": "b"},\n {"instruction": "\xe9"}]', "line 2 is not UTF-8"),
        (b'[{"instruction": "a", "response": "b"}, {"instruction": "a"}]', "record 2 has no response"),
        (b'[{"instruction": "a", "response": "b"}, 3]', "record 2 is not a JSON object"),
        (b"\n \n", "holds no records"),
        (b"[]", "holds no records"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_content_is_one_line_with_its_place(tmp_path, content, where):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(path) in str(caught.value) and where in str(caught.value) and "\n" not in str(caught.value)


def test_missing_field_names_what_was_found_and_what_to_do(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"expected field 'instruction', found answer, question; set data\.fields instruction"):
        load(path)
    with pytest.raises(DataError, match="no field 'kontext' in any record"):
        load(write(tmp_path / "more.jsonl", samples(2)), fields="input=kontext")


def test_truncated_gzip_and_foreign_kinds(tmp_path):
    whole = gzip.compress(b'{"instruction": "a", "response": "b"}\n' * 50)
    for name, content in {"cut.jsonl.gz": whole[:-12], "not.jsonl.gz": b"plain"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            load(tmp_path / name)
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match="neither JSON nor JSONL"):
        load(tmp_path / "rows.csv")


def test_path_that_is_missing_or_holds_nothing_known(tmp_path):
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"none of the files known for json: train\.jsonl"):
        load(tmp_path)


def test_impossible_settings():
    for settings, words in [
        ({"name": "nope"}, "allowed are builtin:toy, gsm8k, dolly, json"),
        ({"path": "x"}, "made by the program"),
        ({"name": "gsm8k"}, "needs data.path"),
    ]:
        with pytest.raises(ConfigError, match=words):
            data.load(data.Config(**settings), 0)
    for settings in [{"alpha": 0.0}, {"alpha": float("nan")}, {"min_rows": 0}, {"max_length": 31}, {"num_rows": 0}]:
        with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}"):
            data.Config(**settings)
    for fields in ["instruction", "instruction=", "question=q"]:
        with pytest.raises(ConfigError, match=r"data\.fields"):
            data.load(data.Config(name="json", path="x", fields=fields), 0)


def test_gsm8k_folder_brings_its_test_split(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(12)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl.gz", rows[:7], compress=True)
    federated = data.federate(data.Config(name="gsm8k", path=str(tmp_path)), None, 0)
    assert [len(client.train) for client in federated.clients] == [4, 4, 4]
    assert sorted(len(client.heldout) for client in federated.clients) == [2, 2, 3]
    assert len(federated.heldout) == 7 and federated.record["heldout"] == "test split"
    assert federated.record["files"]["test"]["name"] == "test.jsonl.gz"


def test_a_tenth_of_each_client_is_held_out_and_never_trained_on(tmp_path):
    write(tmp_path / "databricks-dolly-15k.jsonl", dolly())
    federated = data.federate(data.Config(name="dolly", path=str(tmp_path)), None, 0)
    assert federated.client_categories == ({"a": 27}, {"b": 27}, {"c": 27})
    trained = {row.id for client in federated.clients for row in client.train}
    held = {row.id for client in federated.clients for row in client.heldout}
    assert len(trained) == 81 and len(held) == 9 and not trained & held
    assert held == {row.id for row in federated.heldout}
    assert {row.category for row in federated.clients[1].heldout} == {"b"}


def test_rows_held_out_per_category_follow_the_clients(tmp_path):
    write(tmp_path / "databricks-dolly-15k.jsonl", dolly())
    settings = data.Config(name="dolly", path=str(tmp_path), heldout_per_category=10, splitter="shards")
    federated = data.federate(settings, 3, 0)
    assert [sum(row.category == name for row in federated.heldout) for name in "abc"] == [10, 10, 10]
    for client, share in zip(federated.clients, federated.client_categories, strict=True):
        assert {row.category for row in client.heldout} <= share.keys()
    assert sum(len(client.heldout) for client in federated.clients) == 30
    with pytest.raises(DataError, match=r"too few for data\.heldout"):
        data.federate(data.Config(name="dolly", path=str(tmp_path), heldout_per_category=30), 3, 0)


def test_deals_the_same_for_one_seed_and_otherwise_for_another(tmp_path):
    write(tmp_path / "databricks-dolly-15k.jsonl", dolly())
    settings = data.Config(name="dolly", path=str(tmp_path), splitter="dirichlet", num_rows=60)
    assert data.federate(settings, 4, 1) == data.federate(settings, 4, 1)
    assert data.federate(settings, 4, 1) != data.federate(settings, 4, 2)


def test_clients_that_cannot_be(tmp_path):
    path = str(write(tmp_path / "rows.jsonl", samples(3)))
    plain, sorted_out = data.Config(name="json", path=path), data.Config(name="json", path=path, splitter="meta")
    for settings, clients, error, words in [
        (plain, None, ConfigError, "give --clients N"),
        (plain, 0, ConfigError, "at least 1"),
        (plain, 4, DataError, "3 rows for 4 clients"),
        (plain, 2, DataError, "has 1 row, which is held out"),
        (sorted_out, 2, ConfigError, "needs categories"),
    ]:
        with pytest.raises(error, match=words):
            data.federate(settings, clients, 0)


def test_a_client_left_without_rows_is_refused(tmp_path):
    rows = [{**row, "category": name} for row, name in zip(samples(9), "abbbbbbbb", strict=True)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match="client 2 of 4 gets no rows from splitter meta"):
        data.federate(data.Config(name="json", path=path, splitter="meta"), 4, 0)


def test_toy_is_one_fixed_corpus_and_meta_by_default():
    first, again = data.load(data.Config(num_rows=40), 1), data.load(data.Config(num_rows=40), 2)
    assert first.train == again.train and len(first.train) == 40
    federated = data.federate(data.Config(num_rows=40), None, 0)
    assert all(len(share) == 1 for share in federated.client_categories)
    asked = {(row.instruction, row.input) for row in first.train}
    assert not asked & {(row.instruction, row.input) for row in first.test}


def test_record_is_plain_json_without_a_path(tmp_path):
    write(tmp_path / "databricks-dolly-15k.jsonl", dolly())
    record = data.federate(data.Config(name="dolly", path=str(tmp_path)), 2, 0).record
    assert str(tmp_path) not in json.dumps(record)
    assert [sorted(share) for share in record["client_categories"]] == [["a", "c"], ["b"]]
    assert record["train_rows"] == [54, 27] and record["published_rows"] == [15011, 0]


def test_fields_from_a_recipe(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{"q": f"Q{i}", "a": "A"} for i in range(6)])
    settings = {"name": "json", "path": str(path), "fields": {"instruction": "q", "response": "a"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"clients": 3, "data": settings}))
    assert program.main(["--config", str(tmp_path / "recipe.yaml")]) == 0
    assert "3 clients, 3 training rows" in capsys.readouterr().out


def test_the_house_opens_without_heavy_packages():
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'numpy'}"
    code = f"import sys, fedmpi.data, fedmpi.models; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@real
@pytest.mark.parametrize(
    ("name", "folder", "counts", "categories"),
    [("gsm8k", "gsm8k", (7473, 1319), 1), ("dolly", "dolly15k", (15011, 0), 8)],
)
def test_real_corpora_have_their_published_rows(name, folder, counts, categories):
    corpus = data.load(data.Config(name=name, path=str(SHARED / folder)), 0)
    assert (len(corpus.train), len(corpus.test)) == counts == corpus.declared.rows
    assert len({row.category for row in corpus.train}) == categories


@real
def test_shepherds_split_of_real_dolly():
    settings = {"splitter": "dirichlet", "min_rows": 40, "balance": True, "heldout_per_category": 10}
    federated = data.federate(data.Config(name="dolly", path=str(SHARED / "dolly15k"), **settings), 100, 42)
    sizes = [len(client.train) for client in federated.clients]
    assert len(sizes) == 100 and sum(sizes) == 15011 - 80 and min(sizes) >= 40 and max(sizes) > 4 * min(sizes)
    assert len(federated.heldout) == 80
