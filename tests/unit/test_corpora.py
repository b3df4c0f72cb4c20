"""Corpora and their clients: what is read, what is refused and in which words, and who holds which rows out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tried
from hypothesis import strategies as st

from fedmpi import data
from fedmpi.data import __main__ as program
from fedmpi.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real corpora: {SHARED} is missing")


def write(path, rows, compress=False):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def samples(num, **more):
    return [{"instruction": f"do {i}", "context": f"with {i}", "response": f"done {i}", **more} for i in range(num)]


KINDS = ("brainstorming", "classification", "summarization")  # three of dolly's eight


def dolly(num_per_category=30, categories=KINDS):
    return [row for name in categories for row in samples(num_per_category, category=name)]


def load(path, name="json", **more):
    return data.load(data.Config(name=name, path=str(path), **more), seed=0)


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
    assert program.main(["rosetta"]) == 2
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
        (b'{"instruction": ' + b"1" * 9999 + b"}", "line 1 cannot be read: Exceeds the limit"),
    ],
)
def test_bad_content_is_one_line_with_its_place(tmp_path, content, where):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(path) in str(caught.value) and where in str(caught.value) and "\n" not in str(caught.value)


@tried(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=120).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(
            st.dictionaries(st.sampled_from(["instruction", "response", "x"]), st.text(max_size=5) | st.floats() | st.none())
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.bz2", ".json.xz", ".parquet"]),
    packed=st.booleans(),
)
def test_any_bytes_are_rows_or_one_line(tmp_path, content, suffix, packed):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(PACK.get(path.suffix, bytes)(content) if packed else content)
    name = "csv" if "csv" in suffix else "parquet" if "parquet" in suffix else "json"
    try:
        assert load(path, name=name).train
    except (DataError, ConfigError) as error:  # ConfigError: Parquet without pyarrow
        assert str(path) in str(error) and "\n" not in str(error)


# Python 3.10 cannot write a NUL into CSV, and can read none
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0" * (sys.version_info < (3, 11))), max_size=20)


@tried(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(PLAIN, PLAIN, PLAIN), min_size=1, max_size=5), kind=st.sampled_from(["csv", "json", "array"]))
def test_any_text_comes_back_as_it_was(tmp_path, rows, kind):
    path, names = tmp_path / f"rows.{'csv' if kind == 'csv' else 'json'}", ("instruction", "input", "response")
    if kind == "csv":
        out = io.StringIO(newline="")
        csv.writer(out, quoting=csv.QUOTE_ALL).writerows([names, *rows])
        path.write_bytes(out.getvalue().encode())
    elif kind == "json":
        write(path, [dict(zip(names, row, strict=True)) for row in rows])
    else:
        path.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows], ensure_ascii=False, indent=1), "utf-8")
    found = load(path, name="csv" if kind == "csv" else "json").train
    assert [(row.instruction, row.input, row.output) for row in found] == rows


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
    with pytest.raises(DataError, match="no file for data.name json, which reads .jsonl, .json: give data.name csv"):
        load(tmp_path / "rows.csv")
    (tmp_path / "train.txt").write_text("a,b")
    with pytest.raises(DataError, match="train.txt is no file of rows by its name: expected .jsonl, .json, .csv, .parquet"):
        data.load(data.Config(name="gsm8k", path=str(tmp_path / "train.txt")), 0)


def test_path_that_is_missing_or_holds_nothing_known(tmp_path):
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"none of the files known for json: train\.jsonl"):
        load(tmp_path)


def test_impossible_settings():
    for settings, words in [
        ({"name": "nope"}, "allowed are builtin:toy, gsm8k, dolly, rosetta, .* fed-code-search-net"),
        ({"path": "x"}, "made by the program"),
        ({"name": "json"}, "needs data.path"),
        ({"name": "fed-code-alpaca"}, "needs data.path"),
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
    assert len(federated.heldout) == 7 and federated.heldout_from == "test split"
    assert federated.record["files"]["test"]["name"] == "test.jsonl.gz"


def test_a_tenth_of_each_client_is_held_out_and_never_trained_on(tmp_path):
    write(tmp_path / "databricks-dolly-15k.jsonl", dolly())
    federated = data.federate(data.Config(name="dolly", path=str(tmp_path)), None, 0)
    assert federated.client_categories == tuple({name: 27} for name in KINDS)
    trained = {row.id for client in federated.clients for row in client.train}
    held = {row.id for client in federated.clients for row in client.heldout}
    assert len(trained) == 81 and len(held) == 9 and not trained & held
    assert held == {row.id for row in federated.heldout}
    assert {row.category for row in federated.clients[1].heldout} == {KINDS[1]}


def test_rows_held_out_per_category_follow_the_clients(tmp_path):
    write(tmp_path / "databricks-dolly-15k.jsonl", dolly())
    settings = data.Config(name="dolly", path=str(tmp_path), heldout_per_category=10, splitter="shards")
    federated = data.federate(settings, 3, 0)
    assert [sum(row.category == name for row in federated.heldout) for name in KINDS] == [10, 10, 10]
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
    assert [sorted(share) for share in record["client_categories"]] == [[KINDS[0], KINDS[2]], [KINDS[1]]]
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


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_csv_with_commas_line_ends_and_quotes(tmp_path, suffix):
    content = '\ufeffq,a,lang\r\n"one, ""two""","line\nline",x\r\n\r\nthree,,y\r\n'.encode()
    (tmp_path / f"rows.csv{suffix}").write_bytes(PACK[suffix](content))
    fields = "instruction=q,response=a,category=lang"
    rows = load(tmp_path / f"rows.csv{suffix}", name="csv", fields=fields).train
    assert rows == [data.Row('one, "two"', "", "line\nline", "x", "train:0"), data.Row("three", "", "", "y", "train:1")]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"instruction,response\na,b\nc\n", "line 3 has 1 fields: the first line names 2"),
        (b'instruction,response\na,"b" c\n', "line 2 is not CSV"),
        (b"instruction,instruction\na,b\n", "line 1 names a field twice"),
        (b"instruction,response\n", "holds no records"),
        (b"question,answer\na,b\n", "line 2 has no instruction: expected field 'instruction', found answer, question"),
        (b"instruction,response\na,\xe9\n", "line 2 is not UTF-8"),
        (b"", "holds no records"),
    ],
)
def test_bad_csv_is_one_line_with_its_place(tmp_path, content, where):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / "rows.csv", name="csv")
    assert str(tmp_path / "rows.csv") in str(caught.value) and where in str(caught.value) and "\n" not in str(caught.value)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow (pip install 'fedmpi[data]')")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(samples(3, category="x")), tmp_path / "train.parquet")
    assert load(tmp_path, name="parquet").train[1] == data.Row("do 1", "with 1", "done 1", "x", "train:1")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="is not a Parquet file that can be read"):
        load(tmp_path, name="parquet")


def rosetta(num, language, output="x = 1"):
    return [{"instruction": f"task {i}", "input": language, "output": output} for i in range(num)]


@pytest.mark.parametrize("splitter", ["meta", "iid", "dirichlet", "shards", "quantity", "unequal_shards"])
def test_assembly_leaves_rosetta_in_every_splitter_and_no_break_spaces_are_spaces(tmp_path, splitter):
    rows = rosetta(20, "Go") + rosetta(5, "X86 Assembly") + rosetta(5, "X86-64 Assembly") + rosetta(20, "C#", "x\u00a0= 1")
    write(tmp_path / "rosetta_alpaca.json", rows)
    federated = data.federate(data.Config(name="rosetta", path=str(tmp_path), splitter=splitter), 2, 0)
    held = [row for client in federated.clients for row in [*client.train, *client.heldout]]
    assert len(held) == 40 and {row.category for row in held} == {"Go", "C#"} and {row.output for row in held} == {"x = 1"}
    assert federated.record["files"]["train"]["dropped"] == {"X86 Assembly": 5, "X86-64 Assembly": 5}
    assert federated.record["files"]["train"]["cleaned"] == 20


def test_an_unknown_category_is_refused_with_its_line(tmp_path):
    write(tmp_path / "rosetta_alpaca.json", rosetta(2, "Go") + rosetta(1, "Cobol"))
    with pytest.raises(DataError, match="line 3 has the unknown category 'Cobol': rosetta has C, C#"):
        data.load(data.Config(name="rosetta", path=str(tmp_path)), 0)


LANGUAGES = ("go", "java", "javascript", "php", "python", "ruby")


def function(language, number, part="train"):
    """A record with the fields of CodeSearchNet's published files; code and docstring are ours."""
    code = f'def add_{number}(a):\n    """Add {number}."""\n    return a + {number}'
    where = {"repo": "someone/sums", "path": f"sums/{number}.py", "func_name": f"add_{number}", "sha": "0" * 40, "partition": part}
    tokens = {"code_tokens": code.split(), "docstring_tokens": ["Add", str(number), "."]}
    url = f"https://github.com/someone/sums/blob/{'0' * 40}/sums/{number}.py#L1-L3"
    return {
        **where,
        **tokens,
        "url": url,
        "original_string": code,
        "language": language,
        "code": code,
        "docstring": f"Add {number}.",
    }


def test_code_search_net_as_its_archives_unpack(tmp_path, capsys):
    """LANGUAGE/final/jsonl/PART/LANGUAGE_PART_N.jsonl.gz, with validation rows and definitions beside them that nobody reads."""
    for language in LANGUAGES:
        for part, number in [("train", 0), ("test", 0), ("valid", 0)] + [("train", 1)] * (language == "go"):
            folder = tmp_path / language / "final" / "jsonl" / part
            folder.mkdir(parents=True, exist_ok=True)
            rows = [function(language, i, part) for i in range(4)]
            write(folder / f"{language}_{part}_{number}.jsonl.gz", rows, compress=True)
        (tmp_path / f"{language}_dedupe_definitions_v2.pkl").write_bytes(b"never opened")
    assert program.main(["fed-code-search-net", "--data.path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "fed-code-search-net, splitter meta: 6 clients, 28 training rows, 24 held out (test split)" in printed
    assert [line.split()[-2:] for line in printed.splitlines()[1:7]] == [[name, "8" if name == "go" else "4"] for name in LANGUAGES]
    assert "FS-LLM Table 6 counts another release or part of this corpus: rows 28 here, 1880800 there" in printed
    corpus = data.load(data.Config(name="code_search_net", path=str(tmp_path)), 0)
    assert corpus.train[-1] == data.Row("Add 3.", "ruby", function("ruby", 3)["code"], "ruby", "train:27")
    assert corpus.files["train"]["name"] == "go_train_0.jsonl.gz and 6 more"
    one = data.load(data.Config(name="code_search_net", path=str(tmp_path / "ruby")), 0)
    assert [len(one.train), len(one.test)] == [4, 4]


HUB = """
import sys
from fedmpi.data.__main__ import main
for name in ("fed-gsm8k-3", "fed-code-search-net"):
    assert main([name]) == 0
sys.exit(main(["fed-dolly"]))
"""


def on_the_hub(folder, subset, parts):
    """A repository as it lies on the hub: Parquet, and a card that says which file is of which subset and split."""
    import pyarrow
    import pyarrow.parquet

    (folder / subset).mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {subset}", "  data_files:"]
    for part, rows in parts.items():
        file = f"{subset}/{part}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / file)
        lines += [f"  - split: {part}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def test_the_hub_is_asked_for_subset_split_and_fields_and_its_silence_is_one_line(tmp_path):
    """`datasets` opens a folder of that name in the working directory as it opens the repository on the hub."""
    pytest.importorskip("datasets", reason="the hub needs datasets (pip install 'fedmpi[data]')")
    sums = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(9)]
    on_the_hub(tmp_path / "openai" / "gsm8k", "main", {"train": sums, "test": sums[:3]})
    named = {"code": "func_code_string", "docstring": "func_documentation_string"}
    told = [{named.get(key, key): value for key, value in function(name, i).items()} for name in LANGUAGES for i in range(2)]
    on_the_hub(tmp_path / "code-search-net" / "code_search_net", "all", {"train": told, "validation": told, "test": told[:1]})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ended = subprocess.run([sys.executable, "-c", HUB], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "fed-gsm8k-3, splitter iid: 3 clients, 9 training rows, 3 held out (test split)" in ended.stdout, ended.stderr
    assert "6 clients, 12 training rows, 1 held out (test split; 5 clients have none of it)" in ended.stdout
    assert ended.returncode == 1 and "dolly" not in ended.stdout
    line = ended.stderr.splitlines()[-1]
    assert "databricks/databricks-dolly-15k cannot be had from the hub" in line and line.endswith("give data.path")


@real
@pytest.mark.parametrize(
    ("name", "folder", "counts", "categories"),
    [
        ("gsm8k", "gsm8k", (7473, 1319), 1),
        ("dolly", "dolly15k", (15011, 0), 8),
    ],
)
def test_real_corpora_have_their_published_rows(name, folder, counts, categories):
    corpus = data.load(data.Config(name=name, path=str(SHARED / folder)), 0)
    assert (len(corpus.train), len(corpus.test)) == counts == corpus.declared.rows
    assert len({row.category for row in corpus.train}) == categories


@real
def test_the_rebuilt_rosetta_and_a_part_of_alpaca():
    corpus = data.load(data.Config(name="rosetta", path=str(SHARED / "rosetta")), 0)
    assert len(corpus.train) == 7384 and len({row.category for row in corpus.train}) == 9
    assert corpus.files["train"]["dropped"] == {"X86 Assembly": 56} and corpus.files["train"]["cleaned"] == 4
    alpaca = data.load(data.Config(name="alpaca", path=str(SHARED / "alpaca" / "alpaca_small.json.gz")), 0)
    assert len(alpaca.train) == 2000


@real
def test_shepherds_split_of_real_dolly():
    settings = {"splitter": "dirichlet", "min_rows": 40, "balance": True, "heldout_per_category": 10}
    federated = data.federate(data.Config(name="dolly", path=str(SHARED / "dolly15k"), **settings), 100, 42)
    sizes = [len(client.train) for client in federated.clients]
    assert len(sizes) == 100 and sum(sizes) == 15011 - 80 and min(sizes) >= 40 and max(sizes) > 4 * min(sizes)
    assert len(federated.heldout) == 80
