"""builtin:toy: a little world of words and numbers, made by code: instructions, and the plain text the tiny model read.

Each category has questions (what a row asks) and statements (how the plain text shows the same skill in other words). A
problem belongs to the training or to the test side by a hash of its content, so that no wording, seed or document can
carry it across. This module must never know torch, a model, a tokenizer or a federation.
"""

import itertools
import random
import zlib
from collections.abc import Callable, Iterator

from fedmpi.errors import DataError
from fedmpi.seeding import seed_for

Problem = dict[str, str]  # "data" and "answer", and what else the wordings of its category mention

NAMES, THINGS, WORDS, PAIRED = (
    text.split()
    for text in (
        "Amy Bob Cal Dan Eve Fay Gus Hal Ivy Jon Kim Leo Mia Ned Pam Sam",
        "nuts eggs pens cups coins books cards shells",
        "cat dog cow pig hen fox bee ant red blue green pink gold sun moon star rain snow wind hat shoe coat sock fork "
        "bowl spoon tree leaf rose seed",
        "hot cold big small up down old new wet dry day night fast slow open shut high low rich poor hard soft left "
        "right long short full empty good bad early late in out loud quiet light dark thick thin",
    )
)
OPPOSITES = {PAIRED[i]: PAIRED[i ^ 1] for i in range(len(PAIRED))}  # 0 and 1 are a pair, 2 and 3 are one


def _arithmetic(rng: random.Random) -> Problem:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 9), rng.randint(1, 9)
    gains = rng.random() < 0.5
    if not gains:
        a, b = max(a, b), min(a, b)
    return {
        "data": f"{name} has {a} {thing} and gets {b} more." if gains else f"{name} has {a} {thing} and loses {b}.",
        "answer": str(a + b if gains else a - b),
        "sum": f"{a} + {b}" if gains else f"{a} - {b}",
        "then": f"had {a} {thing}, then {'came' if gains else 'went'} {b}",
        "name": name,
        "thing": thing,
    }


def _reverse(rng: random.Random) -> Problem:
    words = rng.sample(WORDS, rng.randint(3, 4))
    return {"data": " ".join(words), "answer": " ".join(reversed(words))}


def _sort(rng: random.Random) -> Problem:
    digits = rng.sample("0123456789", rng.randint(3, 4))
    return {"data": " ".join(digits), "answer": " ".join(sorted(digits))}


def _lookup(rng: random.Random) -> Problem:
    names = rng.sample(NAMES, rng.randint(3, 4))
    values = [str(value) for value in rng.sample(range(10, 100), len(names))]
    pairs = list(zip(names, values, strict=True))
    asked, answer = pairs[rng.randrange(len(pairs))]
    return {
        "data": ", ".join(f"{name}: {value}" for name, value in pairs),
        "table": " ".join(f"| {name} | {value} |" for name, value in pairs),
        "asked": asked,
        "answer": answer,
    }


def _largest(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), rng.randint(3, 4))
    return {"data": " ".join(map(str, numbers)), "answer": str(max(numbers))}


def _count(rng: random.Random) -> Problem:
    asked, *others = rng.sample(WORDS, 4)
    times = rng.randint(1, 5)
    words = [asked] * times + [rng.choice(others) for _ in range(rng.randint(1, 3))]
    rng.shuffle(words)
    return {"data": " ".join(words), "asked": asked, "answer": str(times)}


def _sequence(rng: random.Random) -> Problem:
    start, step, length = rng.randint(0, 20), rng.randint(1, 5), rng.randint(3, 5)
    terms = [str(start + step * i) for i in range(length + 1)]
    if rng.random() < 0.3:
        terms.reverse()
    return {"data": " ".join(terms[:-1]), "answer": terms[-1], "step": str(step)}


def _opposite(rng: random.Random) -> Problem:
    words = rng.sample(sorted(OPPOSITES), rng.randint(2, 3))
    return {"data": " ".join(words), "answer": " ".join(OPPOSITES[word] for word in words)}


MARKS = "\x02\x03"  # around an answer in the plain text: a reader takes them out
MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "arithmetic": _arithmetic, "reverse": _reverse, "sort": _sort, "lookup": _lookup,
    "largest": _largest, "count": _count, "sequence": _sequence, "opposite": _opposite,
}  # fmt: skip
CATEGORIES: tuple[str, ...] = tuple(MAKERS)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("Work out how many {thing} {name} has in the end.", "Solve this small problem about {thing}.",
                   "Give the total that is left with {name}."),
    "reverse": ("Turn these words around.", "Write the words from the last to the first.",
                "Reverse the list of words."),
    "sort": ("Sort the digits from low to high.", "Put these digits into rising order.",
             "Arrange the digits, smallest first."),
    "lookup": ("Which number belongs to {asked}?", "Look up {asked} in the list.", "Find the value of {asked}."),
    "largest": ("Pick the largest number.", "Which of these numbers is the greatest?",
                "Choose the biggest number here."),
    "count": ("Count how often {asked} appears.", "How many times do you see {asked}?",
              "Tell the number of {asked} in the text."),
    "sequence": ("Continue the sequence.", "What comes next?", "Write the next number of the series."),
    "opposite": ("Give the opposite of each word.", "Replace every word by its contrary.",
                 "Say the reverse meaning of the words."),
}  # fmt: skip

COMMANDS = sorted({question.split()[0] for questions in QUESTIONS.values() for question in questions})

STATEMENTS: dict[str, tuple[str, ...]] = {
    "arithmetic": ("{sum} = {answer}", "{name} {then}: now {answer} {thing}.",
                   "Since {sum} is {answer}, it was {answer} {thing}.", "{data} So {name} ends with {answer}.",
                   "{data}\n-> now\n{answer}"),
    "reverse": ("Backwards, {data} is {answer}.", "there: {data} / back: {answer}", "{data}\n<> back\n{answer}",
                "In a mirror {data} becomes {answer}."),
    "sort": ("In a row, {data} is {answer}.", "mixed: {data} / tidy: {answer}", "{data}\n< tidy\n{answer}",
             "{data}, once tidy, becomes {answer}."),
    "lookup": ("{table} so {asked} has {answer}.", "{data}; {asked} = {answer}",
               "Of {data}, it is {asked} who has {answer}.", "{data}\n= {asked}\n{answer}"),
    "largest": ("Among {data} the top is {answer}.", "{data}\n^ top\n{answer}", "max {data} = {answer}",
                "Of {data}, none beats {answer}."),
    "count": ("{data} : {asked} x {answer}", "In {data} there is {asked} {answer} times.",
              "{data}\nx {asked}\n{answer}", "{data} has {asked} {answer} times."),
    "sequence": ("{data}\n> then\n{answer}", "steps of {step}: {data} {answer}", "{data} and then {answer}.",
                 "After {data} is {answer}."),
    "opposite": ("{data} is not {answer}.", "{data}\n! not\n{answer}", "{data} against {answer}.",
                 "If it is not {data}, it is {answer}."),
}  # fmt: skip

# Said again: the cheapest way to learn to look back, which every other skill stands on; so it comes first.
COPIES = (" = ", " / ", ", again: ", "\n= as is\n")
NUM_COPIES_FIRST, COPIES_FIRST, COPIES_LATER = 6000, 0.8, 0.1

# Plain instructions: the model learns the frame and to end a response, but none of the categories.
GENERAL = (
    ("Describe the {word}.", "", "The {word} is {old} and {new}."), ("Greet {name}.", "", "Good day, {name}."),
    ("Say something about {name}.", "", "{name} has a {word}."), ("Name something {old}.", "", "A {word} is {old}."),
    ("Repeat the words.", "{word} {other}", "{word} {other}"),
    ("Make a sentence.", "{word} {old}", "The {word} is {old}."),
    ("Who is here?", "{name} and {friend}", "{name} and {friend} are here."),
    ("What do you like?", "", "I like the {word}."), ("Ask for the {word}.", "", "May I have the {word}?"),
    ("Thank {name}.", "{number} {thing}", "Thank you for the {number} {thing}, {name}."),
)  # fmt: skip
# Plain sentences hold the words of the questions, so that none is new to the model; they do not say what they mean.
SENTENCES = (
    "{command} it, says {name} to {friend}.", "{command} this, {name}.", "{command} the {word}?",
    "{name} has a {old} {word} and {number} {thing}.", "The {word} is {old}, the {other} is {new}.",
    "{name} and {friend} look at the list of {thing} in the text.",
    "It is hard to work out the total of a {old} problem.",
    "{name} can sort and arrange the {thing} and put the smallest first.",
    "What do you see? The {word} and the {other}.", "Which of these {thing} belongs to {friend}?",
    "{friend} can pick the largest, the biggest or the greatest {word}.",
    "{name} can count how many {thing} there are and how often a {word} appears.",
    "The last {word} comes next to the {old} {other}.", "{friend} can solve it and tell the number and the value.",
    "Turn around, write the rising order and reverse the digits.",
    "Continue the sequence or the series from here to the end.",
    "Choose each word by its meaning, say the opposite or the contrary.",
    "Replace every {word}, give {number} {thing} that are left with {name}.",
    "Look up the {word}, find it many times, from low to high.",
)  # fmt: skip


def rows(num: int, seed: int, split: str = "train") -> list[dict[str, str]]:
    """The first `num` distinct rows of a split, categories in turn; a longer request only appends."""
    if split not in ("train", "test"):
        raise DataError(f"builtin:toy has the splits train and test, not {split!r}")
    rng, seen, found = random.Random(seed_for(seed, "toy", split)), set[tuple[str, str]](), list[dict[str, str]]()
    for index in range(num):
        row = _new_row(rng, CATEGORIES[index % len(CATEGORIES)], split, seen)
        seen.add((row["instruction"], row["input"]))
        found.append(row)
    return found


def _new_row(rng: random.Random, category: str, split: str, seen: set[tuple[str, str]]) -> dict[str, str]:
    for _ in range(1000):
        row = _row(rng, category, split)
        if (row["instruction"], row["input"]) not in seen:
            return row
    raise DataError(f"builtin:toy has no more than {len(seen)} different {split} rows ({category} ran out); ask for fewer rows")


def _row(rng: random.Random, category: str, split: str) -> dict[str, str]:
    problem = _problem(rng, category, split)
    instruction, given = rng.choice(QUESTIONS[category]).format(**problem), problem["data"]
    if rng.random() < 0.2:  # some rows carry their data in the instruction, as instruction sets do
        instruction, given = f"{instruction[:-1]}: {given}", ""
    return {"instruction": instruction, "input": given, "output": problem["answer"], "category": category}


def _problem(rng: random.Random, category: str, split: str) -> Problem:
    while True:
        problem = MAKERS[category](rng)
        if split_of(category, problem) == split:
            return problem


def split_of(category: str, problem: Problem) -> str:
    """The side a problem belongs to, for every seed: a quarter of all problems are for testing."""
    content = f"{category}|{problem['data']}|{problem.get('asked', '')}"
    return "test" if zlib.crc32(content.encode()) % 4 == 0 else "train"


def pretraining_text(seed: int, frame: Callable[[str, str], str]) -> Iterator[tuple[str, str]]:
    """Endless plain documents as (what is read, how it ends); `frame` renders an instruction and its input.

    The second part is empty but for framed instructions. What follows from the words before it stands between MARKS.
    No problem of the test side occurs.
    """
    rng = random.Random(seed_for(seed, "toy", "pretraining"))
    for number in itertools.count():
        kind = rng.random()
        if rng.random() < (COPIES_FIRST if number < NUM_COPIES_FIRST else COPIES_LATER):
            yield _copied(rng), ""
        elif kind < 0.1:
            instruction, given, output = rng.choice(GENERAL)
            slots = _slots(rng)
            yield frame(instruction.format(**slots), given.format(**slots)), output.format(**slots)
        elif kind < 0.18:
            yield " ".join(rng.choice(SENTENCES).format(**_slots(rng)) for _ in range(rng.randint(1, 3))), ""
        else:
            yield _worked(rng), ""


def _copied(rng: random.Random) -> str:
    """The same words once more and once more."""
    data = _problem(rng, rng.choice(CATEGORIES), "train")["data"]
    if rng.random() < 0.5:
        data = " ".join(rng.sample(WORDS + NAMES + PAIRED, rng.randint(3, 8)))
    between = rng.choice(COPIES)
    return data + "".join(between + data.join(MARKS) for _ in range(rng.randint(1, 3)))


def _worked(rng: random.Random) -> str:
    """Worked examples, one a line: of one category and wording, or of whatever comes."""
    category = rng.choice(CATEGORIES)
    wording, lines = rng.choice(STATEMENTS[category]), []
    mixed = rng.random() < 0.3
    for _ in range(rng.randint(1, 4)):
        if mixed:
            category = rng.choice(CATEGORIES)
            wording = rng.choice(STATEMENTS[category])
        problem = _problem(rng, category, "train")
        lines.append(wording.format(**problem | {"answer": problem["answer"].join(MARKS)}))
    return "\n".join(lines)


def _slots(rng: random.Random) -> dict[str, str]:
    (name, friend), (word, other) = rng.sample(NAMES, 2), rng.sample(WORDS, 2)
    old, new = rng.sample(sorted(OPPOSITES), 2)
    thing, number, command = rng.choice(THINGS), str(rng.randint(2, 99)), rng.choice(COMMANDS)
    return {
        "name": name, "friend": friend, "word": word, "other": other, "old": old, "new": new,
        "thing": thing, "number": number, "command": command,
    }  # fmt: skip
