"""The code tasks: pass@k by hand, answers cleaned as each language wants it, canonical programs pass, wrong ones do not."""

import json
from itertools import combinations

import pytest
from evaluation_data import Oracle, shared

from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation import code, languages
from fedmpi.evaluation.languages import LANGUAGES, cleaned, missing_tools
from fedmpi.evaluation.task import Options
from fedmpi.result import Result

FILES = {"humaneval": "humaneval", **{f"humaneval-x:{name}": "humaneval-x" for name in LANGUAGES}}


def test_pass_at_k_is_the_share_of_all_choices():
    """Of all ways to take k of n samples: those with a right one among them."""
    for num, right, k in ((5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 0, 2), (4, 4, 4), (9, 3, 5)):
        choices = list(combinations(range(num), k))
        assert code.pass_at_k(num, right, k) == pytest.approx(sum(min(choice) < right for choice in choices) / len(choices))


def test_fewer_samples_than_k_are_refused():
    with pytest.raises(ConfigError, match="pass@10 needs at least 10 samples of each problem, not 5"):
        code.pass_at_k(5, 5, 10)


@pytest.mark.parametrize(
    ("language", "said", "kept"),
    [
        ("python", "return 1\n\ndef other():\n    pass", "    return 1\n"),
        ("python", "    x = 1\n    return x\n# Test\nprint(x)", "    x = 1\n    return x"),
        ("python", "\n\u00a0\u00a0\u00a0 return 2\nif __name__ == 1:", "    return 2"),
        ("python", " return 3", "    return 3"),
        (
            "cpp",
            'if (a) { s = "}"; } // }\n return 1;\n}\nint other() { }\nint main() {}',
            'if (a) { s = "}"; } // }\n return 1;\n}\n',
        ),
        ("cpp", "return 1;\n}\n```\nSo this works", "return 1;\n}\n"),
        ("java", "return 1;\n    }\n}\npublic class Main {", "return 1;\n    }\n}\n"),
        ("java", "char c = '{';\nreturn 1;\n    }", "char c = '{';\nreturn 1;\n    }\n}"),
        (
            "go",
            "return help()\n}\nfunc help() int {\n return 1 }\nfunc main() { }",
            "return help()\n}\nfunc help() int {\n return 1 }\n",
        ),
        ("go", "return 1\n}\nThat is all.", "return 1\n}\n"),
    ],
)
def test_answers_are_cleaned(language, said, kept):
    assert cleaned(LANGUAGES[language], said) == kept


def test_go_imports_what_is_used_and_no_more():
    problem = {"prompt": 'import (\n    "math"\n)\n\nfunc F() {\n', "import": 'import (\n    "math"\n)\n'}
    problem |= {"test": "func TestF() { time.Now() }", "test_setup": 'package main\nimport (\n    "testing"\n)\n'}
    made = LANGUAGES["go"].program(problem, "rand.Intn(3)\n strings.Repeat()}", "")["main_test.go"]
    assert [line for line in made.splitlines() if line.startswith("import")] == [
        *("import (", 'import "math/rand"', 'import "strings"', 'import "time"'),
    ]


PROBLEM = {"task_id": "P/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1) == 2\n"}


def programs(**changed) -> code.Programs:
    own = {"problems": [PROBLEM], "samples": 1, "ks": (1,), "decoding": code.DECODING}
    return code.Programs("humaneval", "python", **{**own, **changed})


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return x + 1", True),
        ("    return x", False),
        ("    import sys; sys.exit(0)", False),
        ("    import os; os._exit(0)", False),
        ("    while True: pass", False),
        ("    syntax error", False),
    ],
)
def test_a_program_counts_when_all_its_tests_have_run(answer, right, monkeypatch):
    if "while" in answer:
        monkeypatch.setattr(languages, "RUN_S", 1.0)  # it would take as long as it may
    assert programs().judge("P/0#0", PROBLEM, answer)["right"] is right


def test_scores_are_over_problems_and_samples():
    problems = [{**PROBLEM, "task_id": f"P/{n}"} for n in range(3)]
    asked = programs(problems=problems, samples=4, ks=(1, 2))
    right = {0: [1, 0, 0, 0], 1: [1, 1, 1, 1], 2: [0, 0, 0, 0]}
    records = [{"task_id": f"P/{n}", "right": bool(hit), "isolated": True} for n, hits in right.items() for hit in hits]
    found = asked.score(records)
    assert found["pass@1"] == found["score"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert found["pass@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)


CHANCE = ("Go/95",)  # its published solution looks at the first keys of a map, whose order Go draws: right in 4 runs of 9
TRIES = 25


def canonical(name: str, problems: slice, tmp_path) -> None:
    """The published solutions, answered by an oracle, through the whole pipeline; then answers that say nothing."""
    folder = shared(FILES[name])
    speaks = name.partition(":")[2] or "python"
    if missing := [tool for tool in missing_tools(speaks, []) if tool]:
        pytest.skip(f"{name}: {', '.join(missing)} not found here; Debian has {LANGUAGES[speaks].package}")
    known = ("HumanEval.jsonl",) if name == "humaneval" else (f"humaneval_{speaks}.jsonl",)
    every = code._problems(Options(name, data=str(folder)), known)[problems]
    chosen = [problem for problem in every if not missing_tools(speaks, [problem])]
    if len(chosen) < len(every):
        print(f"{name}: {len(every) - len(chosen)} problems need headers that are not found here")
    asked = code.Programs(name, speaks, chosen, 1, (1,), code.DECODING)
    golds = {f"{problem['task_id']}#0": problem["canonical_solution"] for problem in chosen}
    oracle = Oracle(golds)
    oracle.say = lambda prompts, decoding, keys, limits=(): [golds[key] + "\n```\nThat is it." for key in keys]
    found = Result(tmp_path, "code", {}, asked).make(oracle, 10)
    failed = [record for record in found["records"] if not record["right"] and not in_time(asked, record)]
    assert not failed and found["num_problems"] == len(chosen) > 0
    assert found["score"] == 1.0 or {record["task_id"] for record in found["records"] if not record["right"]} <= {*CHANCE}


def in_time(asked: code.Programs, record: dict) -> bool:
    """Whether a program that is right by chance is so in one of many runs."""
    problem = next(problem for problem in asked.problems if problem["task_id"] == record["task_id"])
    again = (asked.judge(record["id"], problem, record["output"]) for _ in range(TRIES))
    return record["task_id"] in CHANCE and any(one["right"] for one in again)


@pytest.mark.parametrize("name", FILES)
def test_ten_canonical_programs_pass(name, tmp_path):
    canonical(name, slice(0, None, 17), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.timeout(3600)
def test_all_canonical_programs_pass(name, tmp_path):
    canonical(name, slice(None), tmp_path)


def test_programs_that_say_nothing_score_nothing(tmp_path):
    found = Result(tmp_path, "code", {}, programs(samples=2)).make(Oracle({}, right=False), 10)
    assert found["score"] == 0.0 and len(found["records"]) == 2


@pytest.mark.parametrize(("speaks", "tool"), [("cpp", r"g\+\+"), ("java", "javac"), ("go", "go")])
def test_a_missing_compiler_is_named_with_its_package(tmp_path, monkeypatch, speaks, tool):
    problem = {**PROBLEM, "prompt": "", "test": "", "declaration": ""}
    (tmp_path / f"humaneval_{speaks}.jsonl").write_text(json.dumps(problem) + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    options = Options(f"humaneval-x:{speaks}", data=str(tmp_path), allow_code_execution=True)
    with pytest.raises(ConfigError, match=f"--task humaneval-x:{speaks} lacks .*{tool}.*: on Debian, apt install"):
        code.build(options, speaks, False)


def test_what_cannot_be_done_is_told_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="give --allow_code_execution"):
        code.build(Options("humaneval"), "python", True)
    allowed = {"allow_code_execution": True}
    with pytest.raises(ConfigError, match="pass@10 needs at least 10 samples"):
        code.build(Options("humaneval", k=(1, 10), **allowed), "python", True)
    with pytest.raises(DataError, match="needs --data: HumanEval.jsonl"):
        code.build(Options("humaneval", **allowed), "python", True)
    with pytest.raises(ConfigError, match="humaneval-x:rust: there are humaneval-x:python"):
        code.build(Options("humaneval-x:rust", **allowed), "rust", False)
    (tmp_path / "HumanEval.jsonl").write_text('{"task_id": "a", "prompt": "b"}\n')
    with pytest.raises(DataError, match="line 1 lacks test"):
        code.build(Options("humaneval", data=str(tmp_path), **allowed), "python", True)
