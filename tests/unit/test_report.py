"""The report tells what the files hold, whole or so far, as one page that is safe to open anywhere."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fedmpi.report import plots, read, render, write
from fedmpi.report.__main__ import main

SETTINGS = """
algorithm: fedavg
scenario: {scenario}
rounds: 6
clients: null
model: {{path: some/model}}
peft: {{method: lora, rank: 8}}
data: {{name: builtin:toy}}
eval: {{rows: 16}}
"""
DATA = {
    "splitter": "meta",
    "heldout": "test split",
    "train_rows": [25, 30],
    "heldout_rows": [4, 5],
    "client_categories": [{"sort": 25}, {"sort": 10, "count": 20}],
}
VOID = ("meta", "link")


class Page(HTMLParser):
    """Checks that tags close as they opened, and collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and (not kind or attrs.get("class") == kind)]


def line(index: int, **more: Any) -> dict[str, Any]:
    """A round of two clients as the program writes it."""
    return {
        "round": index,
        "cohort": [0, 1],
        "counted": [0, 1],
        "failures": {},
        "train_loss": 4.0 - index,
        "client_losses": {"0": 3.5 - index, "1": 4.5 - index},
        "up_bytes": 3000,
        "down_bytes": 1000,
        "control_bytes": 0,
        "wait_s": 0.5,
        "seconds": 2.0,
    } | more


def summary(loss: float, scenario: str = "fed") -> dict[str, Any]:
    scores = {"eval_loss": loss, "exact_match": 0.25, "eval_token_accuracy": 0.5}
    facts = {"scenario": scenario, "launcher": "torchrun", "world": 4, "transport": "torch"}
    return {"base": {"eval_loss": 9.5}, "final": scores, "totals": {}, "data": DATA, **facts}


def folder(path: Path, lines: list[dict[str, Any]] | None, done: dict[str, Any] | None = None, scenario: str = "fed") -> Path:
    """A run folder with these files."""
    path.mkdir(parents=True)
    (path / "record.json").write_text('{"experiment": "0123456789ab"}')
    (path / "config.yaml").write_text(SETTINGS.format(scenario=scenario))
    if lines is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if done:
        (path / "summary.json").write_text(json.dumps(done))
    return path


BASE = {"round": -1, "event": "evaluation", "eval_loss": 9.5}


def test_a_finished_run_with_all_scenarios(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [BASE, line(0, eval_loss=8.25), line(1, eval_loss=7.125)], summary(7.125), "all")
    folder(run / "local" / "clients" / "0", [], summary(8.5, "client 0"))
    folder(run / "local" / "clients" / "1", [], summary(9.0, "client 1"))
    folder(run / "global", [], summary(6.5, "global"))
    assert [(name, scores["eval_loss"]) for name, scores in read(run).rows()] == [
        ("nothing (the base model)", 9.5),
        ("client 0 alone", 8.5),
        ("client 1 alone", 9.0),
        ("mean of the clients alone", 8.75),
        ("all data in one place", 6.5),
        ("the federation", 7.125),
    ]
    page = Page(write(run).read_text(encoding="utf-8"))
    for told in ("fedavg on builtin:toy", "some/model", "torchrun", "2 of 6", "8.00 kB", "6.00 kB up, 2.00 kB down", "4.0 s"):
        assert told in page.text
    assert "Bytes sent per round" in page.text and "Seconds per round" in page.text
    assert [cell["style"] for cell in page.of("td", "heat")] == ["--h:1.000", "--h:0.667", "--h:0.333"]
    assert len(page.of("td", "heat none")) == 1


def test_nothing_on_the_page_leads_outside(tmp_path: Path) -> None:
    page = Page(render(read(folder(tmp_path / "run", [BASE, line(0)], summary(8.0)))))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "a", "form"})
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["data:,"]
    assert not any("src" in attrs or key.startswith("on") for _, attrs in page.tags for key in attrs)
    policy = next(attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'")
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.of("svg")) and page.of("svg")


def test_text_from_files_stays_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>&amp;'
    done = summary(8.0) | {"launcher": evil, "versions": {evil: evil}}
    done["data"] = DATA | {"splitter": evil, "heldout": evil, "client_categories": [{evil: 1}, {}]}
    lines = [line(0, failures={"1": evil}), {"round": 0, "event": evil, "message": evil, evil: evil}]
    run = folder(tmp_path / "run", lines, done)
    (run / "config.yaml").write_text(json.dumps({"algorithm": evil, "rounds": evil, evil: {evil: evil}}))
    (run / "state.json").write_text(json.dumps({"state": evil}))
    page = Page(render(read(run)))
    assert not page.of("script")
    assert page.text.count(evil) >= 12


@pytest.mark.parametrize("lines", [None, [], [BASE], [BASE, line(0)], [line(0, eval_loss=8.0)]])
def test_an_unfinished_run(tmp_path: Path, lines: list[dict[str, Any]] | None) -> None:
    run = folder(tmp_path / "run", lines)
    (run / "state.json").write_text('{"state": "running"}')
    if lines:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"round": 1, "train')  # a line that a crash cut short
    page = Page(render(read(run)))
    assert "running" in page.text and "Results" in page.text
    assert ("9.500" in page.text) == (lines is not None and BASE in lines)


def test_the_federation_so_far(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [BASE, line(0, eval_loss=8.0), line(1)])
    assert [name for name, _ in read(run).rows()] == ["nothing (the base model)", "the federation so far (round 0)"]
    run = folder(tmp_path / "begun", [BASE])
    assert [name for name, _ in read(run).rows()] == ["nothing (the base model)"]


def test_clients_alone_as_far_as_they_are(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", None, scenario="local")
    folder(run / "clients" / "1", [BASE, line(0), line(1)], summary(8.5, "client 1"))
    folder(run / "clients" / "0", [BASE, line(0, train_loss=3.25)])
    found = read(run)
    assert found.traces == {0: [(0, 3.25)], 1: [(0, 4.0), (1, 3.0)]}
    assert [name for name, _ in found.rows()] == ["client 1 alone", "mean of the clients alone"]
    assert "1 of 2 clients alone have finished so far" in Page(render(found)).text
    alone = [(name, scores["eval_loss"]) for name, scores in read(run / "clients" / "1").rows()]
    assert alone == [("nothing (the base model)", 9.5), ("client 1 alone", 8.5)]


def test_missing_and_diverged_figures_leave_gaps(tmp_path: Path) -> None:
    lines = [BASE, line(0), line(1, eval_loss=7.0, train_loss=float("nan")), line(2), {"round": 3, "cohort": [0]}]
    run = read(folder(tmp_path / "run", lines))
    assert run.points("eval_loss") == [(-1, 9.5), (1, 7.0)]
    assert run.points("train_loss") == [(0, 4.0), (2, 2.0)]
    assert "nan" not in Page(render(run)).text


def test_five_hundred_rounds_of_a_hundred_clients(tmp_path: Path) -> None:
    lines = [line(i, client_losses={str((7 * i + k) % 100): 2.0 for k in range(5)}, failures={"9": "gone"}) for i in range(500)]
    text = render(read(folder(tmp_path / "run", lines)))
    page = Page(text)
    assert len(page.of("rect", "hit")) == 4 * 500
    assert "500 failures of clients" in page.text and page.text.count("failure of client 9") == 500
    assert len(text) < 1_500_000


def test_same_files_same_bytes_and_only_the_page_is_written(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [BASE, line(0)])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    first = write(run).read_bytes()
    assert write(run).read_bytes() == first
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before | {"report.html": first}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path / "run", [BASE])
    assert main([str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/new/page.html\n"
    assert (tmp_path / "new" / "page.html").exists() and not (run / "report.html").exists()
    assert main([str(run), "--out", str(run)]) == 1
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("summary.json", "{", "summary.json is not JSON"),
        ("summary.json", "[]", "summary.json holds a list"),
        ("metrics.jsonl", '{"round": 0}\n{\n{"round": 1}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", '{"round": 0}\n{"loss": 1}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", b"\xff\n", "line 1: not JSON"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        ("config.yaml", "", "config.yaml holds no settings"),
        ("record.json", None, "holds no fedmpi run"),
        ("config.yaml", None, "holds no fedmpi run"),
        ("", None, "is not a folder"),
    ],
)
def test_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes | None, told: str) -> None:
    run = folder(tmp_path / "run", [BASE]) if name else tmp_path / "nowhere"
    if content is None and name:
        (run / name).unlink()
    elif content is not None:
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(run)]) == (2 if content is None else 1)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("low", "high", "around", "expected"),
    [
        (0.0, 10.0, True, [0, 2, 4, 6, 8, 10]),
        (1.1, 3.9, True, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
        (1.1, 3.9, False, [1.5, 2.0, 2.5, 3.0, 3.5]),
        (5.0, 5.0, True, [5, 6]),
        (0.0, 0.0, True, [0.0, 0.2]),
    ],
)
def test_ticks(low: float, high: float, around: bool, expected: list[float]) -> None:
    assert plots.ticks(low, high, 6, around=around) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(1e-9, 2e-9), (-3.0, 1e12), (0.1, 0.1), (2.0, 2.0000001), (-5.0, -5.0), (0.0, 1e300)])
def test_ticks_surround_what_they_measure(low: float, high: float) -> None:
    found = plots.ticks(low, high, 6, around=True)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-6 * step and high - 1e-6 * step <= found[-1]


def test_curves_lie_where_the_numbers_say() -> None:
    text = plots.Text("loss", "nats", {0: "zero"})
    drawn = plots.curves(text, [plots.Curve("a", "line a", [(0, 0.0), (2, 10.0)])], [[(1, 5.0)]], 274, 262)
    # 200 pixels each way beside the room for the axes: 60 left, 14 right, 14 above, 48 below
    assert 'd="M60.0 214.0L260.0 14.0"' in drawn
    assert 'd="M160.0 114.0h0"' in drawn  # one point of a client: a dot
    assert "a: 0 in round 0, 10 in round 2" in drawn
    assert [chunk.split("<")[0] for chunk in drawn.split("<title>")[1:]] == ["zero", "round 1", "round 2"]


@pytest.mark.parametrize("num", [1, 4, 500])
def test_bars_stand_on_each_other(num: int) -> None:
    rounds = list(range(num))
    stack = [plots.Curve("low", "block a", [(x, 6.0) for x in rounds]), plots.Curve("up", "block b", [(x, 4.0) for x in rounds])]
    page = Page(plots.bars(plots.Text("bytes", "kB", {}), rounds, stack, 274, 262))
    low, up = (page.of("path", style)[0]["d"] or "" for style in ("block a", "block b"))
    heights = [{float(part.split("H")[0].split("h")[0].split("z")[0]) for part in d.split("V")[1:]} for d in (low, up)]
    assert heights == [{214.0, 94.0}, {94.0, 14.0}]  # 0 to 6, then 6 to 10, of 10 over 200 pixels


def test_nothing_to_draw() -> None:
    text = plots.Text("loss", "nats", {})
    assert plots.curves(text, [], [[]], 300, 200) == plots.bars(text, [], [], 300, 200) == ""


@pytest.mark.parametrize(
    ("value", "step", "told"),
    [(2000.0, 500.0, "2,000"), (2.5, 2.5, "2.5"), (-1.0, 0.2, "−1.0"), (0.25, 0.25, "0.25"), (3e-7, 1e-7, "3e−07")],
)
def test_tick_labels(value: float, step: float, told: str) -> None:
    assert plots.plain(value, step) == told
