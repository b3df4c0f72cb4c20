"""builtin:tiny: the folder of a tiny Llama and its tokenizer, made by `python -m fedmpi.models.tiny`. No torch here."""

from pathlib import Path

FOLDER = Path(__file__).parent
