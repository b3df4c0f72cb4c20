"""The root verb: rules that a reader can follow, on instructions as they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.data.verbs import OTHER, root_verb


@pytest.mark.parametrize(
    ("instruction", "verb"),
    [
        ("Generate a poem about the sea.", "generate"),
        ("Please kindly WRITE a letter", "write"),
        ("Could you please explain gravity?", "explain"),
        ("You need to create two user cases for an app.", "create"),
        ("Given a list of numbers, sort it in place.", "sort"),
        ("Based on the text, please name the author", "name"),
        ("In 50 words, describe a cat", "describe"),
        ("Quickly name three rivers", "name"),
        ("Multiply 3 by 4", "multiply"),
        ("Reply to this mail", "reply"),
        ("What's the capital of Peru?", "what"),
        ("When was Bach, the composer, born?", "when"),
        ("Summarize:\nthe text below", "summarize"),
        ("The capital of Peru", OTHER),
        ("From the passage extract names", OTHER),
        ("12 + 30", OTHER),
        ("", OTHER),
    ],
)
def test_root_verb(instruction, verb):
    assert root_verb(instruction) == verb


@given(st.text(max_size=80))
def test_any_text_has_one_word(text):
    found = root_verb(text)
    assert found.isalpha() and found.isascii() and found == found.lower()
