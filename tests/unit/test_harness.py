"""lm-evaluation-harness, one command away: what it is given, what is refused; where it is installed, its figures are ours."""

import json
import sys
from types import ModuleType

import pytest

from fedmpi import evaluate, models
from fedmpi.errors import ConfigError
from fedmpi.evaluation import harness
from fedmpi.evaluation.speaker import open_speaker

TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [{"question": f"{n} and {n + 1}: bigger is", "choices": [str(n), str(n + 1)], "gold": 1} for n in range(4)]


def ask(tmp_path, name: str, *more: str) -> int:
    return evaluate.main(["builtin:tiny", "--task", f"lm_eval:{name}", "--device", "cpu", "--out", str(tmp_path), *more])


def test_it_is_one_command_away(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert ask(tmp_path, "arc_easy") == 2 and "pip install 'fedmpi[eval]'" in capsys.readouterr().err
    fake, tasks, seen = ModuleType("lm_eval"), ModuleType("lm_eval.tasks"), {}
    tasks.TaskManager = dict
    fake.simple_evaluate = lambda **given: (
        seen.update(given) or {"results": {"arc_easy": {"acc": 0.5}}, "samples": {"arc_easy": [1]}}
    )
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    assert ask(tmp_path, "arc_easy", "--rows", "3", "--data", "folder") == 0
    assert seen["tasks"] == ["arc_easy"] and seen["limit"] == 3 and seen["task_manager"] == {"include_path": "folder"}
    assert "peft" not in seen["model_args"] and str(seen["model_args"]["dtype"]) == "torch.float32"
    found = json.loads((tmp_path / "lm_eval-arc_easy.json").read_text())
    assert found["results"] == {"arc_easy": {"acc": 0.5}} and found["records"] == {"arc_easy": [1]}
    fake.simple_evaluate = lambda **given: {}["no such task"]
    assert ask(tmp_path, "nonsense") == 1 and "lm_eval:nonsense failed: KeyError" in capsys.readouterr().err


def test_a_quantized_base_is_refused():
    with pytest.raises(ConfigError, match="not in int8"):
        harness.require_readable(models.Config("any", quantization="int8"), None)


def test_its_figures_of_a_task_of_ones_own_are_ours(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'fedmpi[eval]')")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "ours.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    base = models.Config("builtin:tiny")
    model = models.add_adapter(models.load_model(base), models.PeftConfig(), 0)
    models.save_adapter(model, {name: tensor + 0.02 for name, tensor in models.trainable(model).items()}, tmp_path / "adapter")
    found = harness.evaluate("ours", str(tmp_path), base, tmp_path / "adapter", "cpu", 2, None)
    speaker = open_speaker(base, tmp_path / "adapter", "cpu", 2)
    for row, record in zip(ROWS, found["records"]["ours"], strict=True):
        examples = [speaker.encode(row["question"], f" {choice}", choice) for choice in row["choices"]]
        ours = [-measure.loss for measure in speaker.measure(examples)]
        assert [reply[0][0] for reply in record["resps"]] == pytest.approx(ours, abs=1e-4)
