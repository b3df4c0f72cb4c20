"""What is wrong with data or a task, as a user meets it: the command ends, one line says what and where, and no result is begun."""

import json
from pathlib import Path

import pytest

from fedmpi import evaluate, run
from fedmpi.data import __main__ as show

GOOD = '{"instruction": "a", "output": "b"}\n'
FILES = {
    "good.jsonl": GOOD * 6,
    "lacking.jsonl": GOOD + '{"instruction": "a", "answer": "b"}\n',
    "latin.jsonl": GOOD.encode() + '{"instruction": "é", "output": "b"}\n'.encode("latin-1"),
    "broken.jsonl": GOOD * 2 + '{"instruction": \n',
    "broken.json": '[{"instruction": "a",\n "output" "b"}]',
    "empty.jsonl": "",
    "short.csv": "instruction,output\na,b\na\n",
    "torn.jsonl.gz": b"\x1f\x8b\x08\x00no more",
    "dolly.jsonl": '{"instruction": "a", "context": "", "response": "b", "category": "riddles"}\n',
    "mute.txt": "Q: {instruction}\n",
    "split/train.jsonl": '{"question": "1+1?", "answer": "2\\n#### 2"}\n' * 6,
    "split/test.jsonl": "",
    "humaneval_cpp.jsonl": json.dumps({"task_id": "CPP/0", "prompt": "", "test": "", "declaration": ""}) + "\n",
    "gsm8k.jsonl": '{"question": "How many?", "answer": "Seven."}\n',
    "xsum.jsonl": '{"document": "a", "summary": "b"}\n{"document": "a"}\n',
    "hurt/raft.jsonl": "{\n",
    "questions.jsonl": '{"text": "Who are you?"}\n',
}
JSON = ("--data.name=json", "--data.path")
DATA = {
    "missing fields": (
        (*JSON, "lacking.jsonl"),
        ["lacking.jsonl line 2 has no response", "found answer, instruction", "data.fields response=NAME"],
    ),
    "another encoding": ((*JSON, "latin.jsonl"), ["latin.jsonl line 2 is not UTF-8", "save the file as UTF-8"]),
    "broken JSON of lines": ((*JSON, "broken.jsonl"), ["broken.jsonl line 3 is not JSON"]),
    "a broken JSON array": ((*JSON, "broken.json"), ["broken.json line 2 is not JSON"]),
    "a short row of CSV": (
        ("--data.name=csv", "--data.path", "short.csv"),
        ["short.csv line 3 has 1 fields", "first line names 2"],
    ),
    "a file cut short": ((*JSON, "torn.jsonl.gz"), ["torn.jsonl.gz cannot be read"]),
    "fewer rows than clients": ((*JSON, "good.jsonl", "--clients=9"), ["6 rows for 9 clients", "fewer clients"]),
    "an unknown category": (
        ("--data.name=dolly", "--data.path", "dolly.jsonl"),
        ["dolly.jsonl line 1", "unknown category 'riddles'", "brainstorming"],
    ),
    "no rows": ((*JSON, "empty.jsonl"), ["empty.jsonl holds no records"]),
    "an empty test split": (("--data.name=gsm8k", "--data.path", "split"), ["split/test.jsonl holds no records"]),
    "a template without a response": ((*JSON, "good.jsonl", "--data.template=mute.txt"), ["mute.txt has no place {response}"]),
    "no such file": ((*JSON, "nowhere.jsonl"), ["nowhere.jsonl is neither a file nor a folder"]),
    "categories that are not there": (
        (*JSON, "good.jsonl", "--data.splitter=meta"),
        ["splitter meta needs categories", "category=NAME"],
    ),
}
CODE = ("--allow_code_execution",)
TASKS = {
    "a missing compiler": (("humaneval-x:cpp", "--data", ".", *CODE), ["lacks g++", "apt install"]),
    "code that nobody allowed": (("humaneval", "--data", "."), ["give --allow_code_execution"]),
    "fewer samples than k": (("humaneval", "--k", "10", "--samples", "5", *CODE), ["pass@10 needs at least 10 samples"]),
    "HELM without data": (("helm-mini",), ["finds no data", "needs --data: mmlu_test.jsonl", "question, subject, choices, answer"]),
    "HELM in another folder": (("helm-mini", "--data", "split"), ["finds no data", "split holds none of its files"]),
    "HELM with a broken file": (("helm", "--data", "hurt"), ["raft.jsonl line 1 is not JSON"]),
    "a record of another kind": (("helm:xsum", "--data", "."), ["xsum.jsonl line 2 is no question of xsum", "document, summary"]),
    "gsm8k without data": (("gsm8k",), ["--task gsm8k needs --data"]),
    "a gold answer without a number": (("gsm8k", "--data", "gsm8k.jsonl"), ["its answer has no number after ####"]),
    "shots that are none": (("gsm8k", "--data", "split/train.jsonl", "--shots", "mute.txt"), ["mute.txt", "no pair of Q: and A:"]),
    "a judge without an address": (("judge", "--data", "."), ["--task judge needs --judge_url"]),
    "a judge who is not there": (
        ("judge", "--data", ".", "--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "j", "--against", "nowhere.json"),
        ["--against nowhere.json is no result of --task answers"],
    ),
    "a task that nobody knows": (("trivia",), ["'trivia' is not known; there are"]),
}


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Run a command among the bad files; gives its one line on stderr, and holds it to leave no result."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)

    def go(main, *arguments: str) -> str:
        code = main(list(arguments))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedmpi:")]
        assert code in (1, 2) and len(lines) == 1, (code, lines)
        begun = [path.name for path in tmp_path.joinpath("out").rglob("*") if path.is_file()]
        assert not set(begun) - {".lock", "config.yaml", "record.json", "state.json"}, "what a start leaves, and no result"
        return lines[0]

    return go


@pytest.mark.parametrize("case", DATA)
def test_data_of_a_run(case, said):
    arguments, words = DATA[case]
    clients = () if any("clients" in argument for argument in arguments) or "dolly" in arguments[0] else ("--clients=2",)
    line = said(run.main, *arguments, *clients, "--run_dir", "out")
    assert all(word in line for word in words), line


@pytest.mark.parametrize("case", ["missing fields", "broken JSON of lines", "fewer rows than clients", "an unknown category"])
def test_data_that_are_only_looked_at(case, said):
    arguments, words = DATA[case]
    line = said(show.main, *arguments, *(() if "--clients=9" in arguments else ("--clients=2",)))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("case", TASKS)
def test_tasks(case, said, tmp_path, monkeypatch):
    (task, *more), words = TASKS[case]
    if case == "a missing compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    line = said(evaluate.main, "builtin:tiny", "--task", task, *more, "--out", "out")
    assert all(word in line for word in words), line


def test_a_client_without_test_rows_is_fine_and_said(said, capsys):
    rows = [{"instruction": "a", "output": "b", "category": name} for name in "xyz" for _ in range(3)]
    Path("split/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("split/test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert show.main(["json", "--data.path", "split", "--data.splitter", "meta"]) == 0
    assert "1 held out (test split; 2 clients have none of it)" in capsys.readouterr().out
