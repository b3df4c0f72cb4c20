"""The token cache: the same examples from disk, a key of all that they depend on, many ranks at once, damage that is told."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmpi import data, models
from fedmpi.data import cache, prompts
from fedmpi.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(models.Config())


ROWS = [data.Row(f"say {i}", "" if i % 2 else "softly", "yes " * i, "", f"train:{i}") for i in range(12)]


def config(folder, **more):
    return data.Config(**{"max_length": 32, "cache": str(folder), **more})


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_comes_back_is_what_was_made(tmp_path, tokenizer, monkeypatch):
    made = data.tokenize(ROWS, tokenizer, config(tmp_path / "new" / "folder"))
    assert made == prompts.tokenize(ROWS, tokenizer, config(tmp_path)) and made[1].cut > 0
    monkeypatch.setattr(prompts, "tokenize", None)  # from here on nothing is tokenised
    assert data.tokenize(ROWS, tokenizer, config(tmp_path / "new" / "folder")) == made
    [name] = files(tmp_path / "new" / "folder")
    assert name.endswith(".safetensors") and (tmp_path / "new" / "folder" / name).stat().st_mode & 0o077 == 0


def test_rows_keep_their_own_names(tmp_path, tokenizer):
    data.tokenize(ROWS, tokenizer, config(tmp_path))
    renamed = [replace(row, id=f"7:{row.id}") for row in ROWS]
    assert [example.id for example in data.tokenize(renamed, tokenizer, config(tmp_path))[0]] == [row.id for row in renamed]
    assert len(files(tmp_path)) == 1


def test_none_is_made_where_none_is_asked_for(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.tokenize(ROWS, tokenizer, data.Config())
    assert files(tmp_path) == []


def test_no_rows_and_dropped_rows(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "_fit", lambda prompt, response, _: (prompt, []) if len(response) < 5 else (prompt, response))
    for rows in ([], ROWS, ROWS[:1]):
        made = data.tokenize(rows, tokenizer, config(tmp_path))
        assert data.tokenize(rows, tokenizer, config(tmp_path)) == made
    assert len(files(tmp_path)) == 3 and made[1].dropped == 1


TEXTS = st.lists(st.tuples(*[st.text(max_size=12)] * 3), min_size=1, max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(texts=TEXTS, others=TEXTS)
def test_a_key_is_of_the_texts_and_their_borders(texts, others, tokenizer):
    def key(parts):
        rows = [data.Row(*part, "", f"r{i}") for i, part in enumerate(parts)]
        return cache.key(rows, tokenizer, data.Config())

    assert (key(texts) == key(others)) == (texts == others)


def test_a_key_is_of_template_length_and_tokenizer(tokenizer):
    class Other:
        backend_tokenizer, bos_token_id, eos_token_id = tokenizer.backend_tokenizer, 99, tokenizer.eos_token_id

    wanted = data.Config()
    keys = {cache.key(ROWS, tokenizer, c) for c in (wanted, replace(wanted, max_length=64), replace(wanted, template="qa"))}
    keys |= {cache.key(ROWS, Other(), wanted), cache.key(ROWS[::-1], tokenizer, wanted)}
    assert len(keys) == 5
    assert cache.key(ROWS, tokenizer, replace(wanted, name="gsm8k", path="x", alpha=1.0)) in keys  # nothing else counts
    with pytest.raises(ConfigError, match="needs a fast tokenizer, object is none"):
        cache.key(ROWS, object(), wanted)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_damage_is_told_with_what_to_do(tmp_path, tokenizer, damage):
    data.tokenize(ROWS, tokenizer, config(tmp_path))
    path = tmp_path / files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"cut": content[:-8], "changed": content, "empty": b""}[damage])
    with pytest.raises(DataError, match="delete it, it is made anew"):
        data.tokenize(ROWS, tokenizer, config(tmp_path))


def test_a_place_that_cannot_be_written(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        data.tokenize(ROWS, tokenizer, config(tmp_path / "file"))


RANK = """
import sys, time
from pathlib import Path
from fedmpi.data import Config, Row, cache

class Letters:  # a tokenizer, so that no rank pays for transformers
    bos_token_id, eos_token_id, backend_tokenizer = 1, 2, None
    def to_str(self):
        return "letters"
    def __call__(self, texts, **_):
        return {"input_ids": [[3 + ord(letter) for letter in text] for text in texts]}

rows = [Row(f"say {i}", "", "yes " * (i % 40), "", f"train:{i}") for i in range(400)]
tokenizer = Letters()
tokenizer.backend_tokenizer = tokenizer
folder, go = sys.argv[1:]
print("ready", flush=True)
while not Path(go).exists():
    time.sleep(0.001)
examples, counts = cache.tokenize(rows, tokenizer, Config(cache=folder))
again, _ = cache.tokenize(rows, tokenizer, Config(cache=folder))
assert examples == again
print(hash(tuple(tuple(example.input_ids) for example in examples)), counts)
"""


def test_many_ranks_begin_at_once(tmp_path):
    go, folder = tmp_path / "go", tmp_path / "cache"
    command = [sys.executable, "-c", RANK, str(folder), str(go)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) for _ in range(4)]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 4
        go.touch()
        said = {rank.communicate(timeout=120)[0] for rank in ranks}
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert len(said) == 1 and "rows=400" in said.pop()
    assert len(files(folder)) == 1


def test_a_recipe_can_name_it(tmp_path):
    from fedmpi.settings import recipe

    (tmp_path / "r.yaml").write_text(json.dumps({"data": {"cache": "tokens", "group_by_length": True}}))
    wanted, _ = recipe.read(["--config", str(tmp_path / "r.yaml")], "run", "")
    assert wanted.data.cache == "tokens" and wanted.data.group_by_length
