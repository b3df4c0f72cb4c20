"""The judge, against a local server that speaks the protocol: both orders, three ratings, faults, and FedIT's relative score."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from evaluation_data import Oracle

from fedmpi import data, evaluate
from fedmpi.errors import DataError, EvaluationError
from fedmpi.evaluation import judge
from fedmpi.evaluation.task import Options
from fedmpi.result import Result


class Service:
    """Rates "good" 8 and everything else 4, and adds 1 for the first place; `faults` are statuses to answer with before."""

    def __init__(self, faults=(), text=None):
        self.faults, self.text, self.requests, self.keys = list(faults), text, [], []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append((self.path, body))
                service.keys.append(self.headers.get("Authorization"))
                status = service.faults.pop(0) if service.faults else 200
                said = service.text or service.reply(body["messages"][-1]["content"])
                answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def reply(self, prompt):
        first, second = (part.split("\n\n")[0] for part in prompt.split(":\n")[2:4])
        return f"{8 + 1 if 'good' in first else 4 + 1} {8 if 'good' in second else 4}\nThe first was first."

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def build(tmp_path, url) -> judge.Judged:
    questions = [{"question": "Who are you?", "question_id": 7}, {"instruction": "Tell a joke"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "other.json").write_text(
        json.dumps({"records": [{"id": "7", "output": "bad"}, {"id": "1", "output": "a good one"}]})
    )
    options = Options(
        "judge", data=str(tmp_path / "questions.jsonl"), judge_url=url + "/", judge_model="j", against=str(tmp_path / "other.json")
    )
    return judge.build_judged(options, data.Config(), None)


def test_both_orders_three_times_and_the_relative_score(tmp_path, monkeypatch):
    monkeypatch.setenv(judge.KEY, "secret-key")
    with Service() as service:
        result = Result(tmp_path / "out", "judge", {}, build(tmp_path, service.url))
        found = result.make(Oracle({"7": "good", "1": "dull"}), 9)
    assert [record["ratings"] for record in found["records"]] == [[[5, 8], [4, 9]] * 3, [[9, 4], [8, 5]] * 3]
    assert (found["our_sum"], found["other_sum"]) == (8.5 + 4.5, 4.5 + 8.5) and found["score"] == 1.0
    assert len(service.requests) == 2 * 6 and {path for path, _ in service.requests} == {"/v1/chat/completions"}
    assert {body["model"] for _, body in service.requests} == {"j"} and set(service.keys) == {"Bearer secret-key"}
    assert "secret-key" not in (tmp_path / "out" / "judge.json").read_text()


def test_a_busy_judge_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    with Service(faults=[503, 429]) as service:
        assert judge.Judge(service.url, "j").rate("q", "good", "bad", 0) == (9, 4)
        assert len(service.requests) == 3


def test_a_judge_that_fails_is_told_and_ratings_are_kept(tmp_path):
    with Service(faults=[200] * 6 + [401]) as service:
        result = Result(tmp_path / "out", "judge", {}, build(tmp_path, service.url))
        with pytest.raises(EvaluationError, match="gave no reply .HTTP 401.: mend it and start again"):
            result.make(Oracle({"7": "good", "1": "dull"}), 1)
        found = result.make(Oracle({"7": "good", "1": "dull"}), 1)
    assert found["asked_now"] == 1 and found["score"] == 1.0


def test_the_two_commands_and_no_question_is_rated_twice(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"text": f"What is {n}?"}) + "\n" for n in range(3)))
    asked = ["builtin:tiny", "--data", str(tmp_path / "questions.jsonl"), "--max_new_tokens", "2", "--out", str(tmp_path)]
    assert evaluate.main([*asked, "--task", "answers"]) == 0
    with Service(faults=[200] * 12 + [401], text="8 7") as service:
        whom = ["--judge_url", service.url, "--judge_model", "j", "--against", str(tmp_path / "answers.json")]
        assert evaluate.main([*asked, "--task", "judge", *whom]) == 1
        assert evaluate.main([*asked, "--task", "judge", *whom]) == 0
        assert len(service.requests) == 3 * 6 + 1
    found = json.loads((tmp_path / "judge.json").read_text())
    assert (found["num_rows"], found["score"], found["asked_now"]) == (3, 1.0, 1), "the same answers, in both places"


def test_a_judge_that_only_talks_gives_no_score(tmp_path):
    with Service(text="Both are fine.") as service:
        result = Result(tmp_path / "out", "judge", {}, build(tmp_path, service.url))
        with pytest.raises(EvaluationError, match="never began a reply with two numbers"):
            result.make(Oracle({"7": "good", "1": "dull"}), 1)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [("8 7\nBecause", (8, 7)), ("8.5, 7", (8.5, 7)), ("9/10 3/10", (9, 3)), ("11 3", None), ("Scores: 8 7", None), ("0 5", None)],
)
def test_scores_of_replies(reply, scores):
    assert judge.scores_of(reply) == scores


def test_answers_that_are_missing_are_told(tmp_path):
    build(tmp_path, "http://x")
    (tmp_path / "other.json").write_text('{"records": [{"id": "7", "output": "bad"}]}')
    options = Options(
        "judge", data=str(tmp_path / "questions.jsonl"), judge_url="x", judge_model="j", against=str(tmp_path / "other.json")
    )
    with pytest.raises(DataError, match="has no answer to question 1 and 0 others"):
        judge.build_judged(options, data.Config(), None)


def test_questions_of_one_name_are_told(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question_id": 3, "text": "a"}\n{"question_id": 3, "text": "b"}\n')
    with pytest.raises(DataError, match="questions.jsonl has question_id 3 more than once"):
        judge.build_answers(Options("answers", data=str(tmp_path / "questions.jsonl")), data.Config(), None)
