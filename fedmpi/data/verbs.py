"""The root verb of an instruction, by rules over its first sentence; no parser, no model. It must never see a response.

Instructions are mostly imperatives, so the rule is: lower the first sentence, step over politeness (`please`, `can you ...`),
over a leading clause up to its comma (`Given a list, sort it`) and over adverbs, and take the word that stands there. A question
has no imperative: its root is its question word (`what`, `is`). What is left without a word is `other`. A dependency parser
would tell participles and rare inversions better; for dealing rows to clients what counts is that equal beginnings meet.
"""

import re

OTHER = "other"
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
SENTENCE_END = re.compile(r"[.!?:\n]\s|\n")
POLITE = re.compile(
    r"^(?:please|kindly|now|then|(?:can|could|would|will) you|you (?:need|have) to|i (?:want|need|would like) you to)\b[\s,]*"
)
CLAUSES = frozenset({"given", "based", "according", "using", "considering", "imagine", "suppose", "assume", "if", "while"})
PREPOSITIONS = frozenset({"in", "for", "from", "with", "by", "after", "before", "as", "to", "on", "at", "of", "without", "within"})
PRONOUNS = frozenset({"i", "you", "he", "she", "it", "we", "they", "my", "your", "his", "her", "its", "our", "their"})
ARTICLES = frozenset({"a", "an", "the", "this", "that", "these", "those"})
NO_VERBS = PREPOSITIONS | PRONOUNS | ARTICLES | {"if", "while"}
NO_ADVERBS = frozenset({"apply", "reply", "supply", "multiply"})


def root_verb(instruction: str) -> str:
    """One lower-case word."""
    sentence = SENTENCE_END.split(instruction.strip().lower(), maxsplit=1)[0]
    shorter = POLITE.sub("", sentence)
    while shorter != sentence:
        sentence, shorter = shorter, POLITE.sub("", shorter)
    words: list[str] = WORD.findall(sentence)
    if words and words[0] in CLAUSES | PREPOSITIONS:
        words = _after_clause(sentence) or words
    while len(words) > 1 and words[0].endswith("ly") and words[0] not in NO_ADVERBS:
        words = words[1:]
    verb = words[0].partition("'")[0] if words else OTHER
    return OTHER if verb in NO_VERBS else verb


def _after_clause(sentence: str) -> list[str]:
    """The words of the main clause, where a leading clause ends with a comma."""
    words: list[str] = WORD.findall(POLITE.sub("", sentence.partition(",")[2].strip()))
    return words
