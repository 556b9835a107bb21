"""Records that are set anew: text in which only the latest value of a key is right, for training the gate of copying.

Keys are set once or many times in the older part of a text, some once more in its raw window, in the same words or as
a remark; then all of them are listed with the values that hold. Everything is drawn, offline. Other wordings are for
measuring (`eval.reading`): none of theirs may be added here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import InputError

_WORDS = """amber basin cedar delta ember fjord grove harbor ivory jasper kelp lagoon maple nickel onyx pearl quartz
raven sable timber umber velvet willow xenon yarrow zephyr anchor beacon cobalt dune falcon glacier hazel indigo
juniper kestrel linden meadow nectar orchid""".split()  # noqa: SIM905
_VERBS = "fetch parse render merge split load dump scan route queue flush trace patch probe index".split()  # noqa: SIM905
_KEYS: dict[str, Callable[[str, str], str]] = {
    "snake": lambda a, b: f"{a}_{b}",
    "camel": lambda a, b: a + b.capitalize(),
    "dash": lambda a, b: f"{a}-{b}",
    "upper": lambda a, b: f"{a}_{b}".upper(),
    "dot": lambda a, b: f"{a}.{b}",
    "person": lambda a, b: f"{a.capitalize()} {b.capitalize()}",
    "plain": lambda a, b: f"{a} {b}",
}
FORMS = (  # how keys are spelt, how one is set, what stands before the list of all
    ("upper", "export {key}={value}\n", "# environment\n"),
    ("camel", '  "{key}": {value},\n', "{{\n"),
    ("snake", "self.{key} = {value}\n", "def state(self):\n"),
    ("person", "{key} now sits in room {value}.\n", "Where everybody sits:\n"),
    ("dash", "- {key} -> {value}\n", "Routes\n"),
    ("dot", "SET {key} {value};\n", "-- settings\n"),
    ("plain", "The price of {key} is {value}.\n", "Prices today.\n"),
    ("snake", "#define {key} {value}\n", "/* constants */\n"),
    ("upper", "{key}\t{value}\n", "NAME\tVALUE\n"),
    ("camel", "let {key} = {value};\n", "// bindings\n"),
    ("dash", "<{key}>{value}</{key}>\n", "<state>\n"),
    ("snake", "[{key}]\nvalue = {value}\n", "; sections\n"),
    ("person", "{key} ({value})\n", "Members\n"),
    ("snake", "from core import {value} as {key}\n", "# imports\n"),
    ("dot", "12:04 WARN {key} changed: {value}\n", "tail of the journal\n"),
)
REMARKS = ("Note: {key} changed to {value}.\n", "{key} was wrong above, use {value}.\n", "(update) {key}: {value}\n",
           "As of today {key} is {value}\n", "TODO fix: {key} should be {value}\n")  # fmt: skip
_NUMBERS_OF_KEYS, _TIMES_SET = (2, 3, 4, 6, 8, 12, 20), (1, 1, 2, 3, 5, 9, 17, 33, 60)
_LISTED, _REMARKED = 420, 300  # tokens of the list and of the remarks, at most


def _value(kind: str, random: np.random.Generator) -> str:
    word, number = str(random.choice(_WORDS)), int(random.integers(2, 9999))
    return {
        "int": str(number),
        "float": f"{number / 100:.2f}",
        "word": word,
        "quoted": f'"{word}"',
        "path": f"/srv/{word}/{random.choice(_WORDS)}",
        "date": f"20{number % 20 + 10}-{number % 12 + 1:02d}-{number % 28 + 1:02d}",
        "call": f"{random.choice(_VERBS)}_{word}",
        "version": f"{number % 10}.{number % 31}.{number % 7}",
        "hex": f"0x{number * 1657:06x}",
    }[kind]


def record_row(
    encode: Callable[[str], list[int]],
    other: np.ndarray,
    length: int,
    older: tuple[int, int],
    random: np.random.Generator,
) -> tuple[np.ndarray, int]:
    """A text `[length]` that ends with a list of keys and the values that hold, and how many tokens the list has.

    Args:
        encode: text to token ids, without special ones.
        other: ids of other text, at least `length`: what stands around the records.
        length: tokens.
        older: `(start, end)` of the part that will stand compressed; the records begin in it.
        random: draws everything.

    Raises:
        InputError: a text that is too short for any records.
    """
    style, line, head = FORMS[int(random.integers(len(FORMS)))]
    kinds = random.choice(["int", "float", "word", "quoted", "path", "date", "call", "version", "hex"], 20)
    mixed = bool(random.random() < 0.3)
    number = int(random.choice(_NUMBERS_OF_KEYS))
    pairs = random.permutation(len(_WORDS) ** 2)[:number]
    keys = [_KEYS[style](_WORDS[p // len(_WORDS)], _WORDS[p % len(_WORDS)]) for p in pairs]
    times, room = int(random.choice(_TIMES_SET)), (older[1] - older[0]) * 5 // 8
    held: dict[int, str] = {}
    pieces: list[list[int]] = []
    for _ in range(times):
        for k in random.permutation(number).tolist():
            value = _value(str(kinds[k if mixed else 0]), random)
            piece = encode(line.format(key=keys[k], value=value))
            if sum(map(len, pieces)) + len(piece) <= room:
                held[k] = value
                pieces.append(piece)
    if not held:
        raise InputError(f"records: expected room for one in {older[1] - older[0]} tokens, got too little")
    remarks: list[int] = []
    again = random.random() / 2 if random.random() < 0.5 else 0.0  # share of keys that the window sets once more
    for k in random.permutation(list(held)).tolist():
        if random.random() < again:
            value = _value(str(kinds[k if mixed else 0]), random)
            words = line if random.random() < 0.4 else str(random.choice(REMARKS))
            piece = encode(("" if remarks else "\n") + words.format(key=keys[k], value=value))
            if len(remarks) + len(piece) <= min(_REMARKED, (length - older[1]) // 3):
                held[k] = value
                remarks += piece
    # one time in four the list is written in other words than the records
    ask = line if random.random() < 0.75 else FORMS[int(random.integers(len(FORMS)))][1]
    listed, said = encode("\n" + head.format()), 0
    for k in random.permutation(list(held)).tolist():
        piece = encode(ask.format(key=keys[k], value=held[k]))
        if len(listed) + len(piece) > min(_LISTED, length - older[1] - len(remarks) - 1):
            break
        listed, said = listed + piece, said + 1
    if not said:
        raise InputError(f"records: expected room for a list behind the older part, got {length - older[1]} tokens")
    return _placed(pieces, remarks, listed, other, length, older, random), len(listed)


def _placed(
    pieces: Sequence[list[int]], remarks: list[int], listed: list[int], other: np.ndarray, length: int,
    older: tuple[int, int], random: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Records in one to five runs somewhere in the older part; remarks and list at the end."""
    runs = np.array_split(np.arange(len(pieces)), min(len(pieces), int(random.choice([1, 1, 2, 5]))))
    texts = [[token for n in run for token in pieces[n]] for run in runs]
    free = older[1] - older[0] - sum(map(len, texts))
    places = np.sort(random.integers(0, free + 1, len(texts)))
    rest, at, ids = other.tolist(), 0, []
    for place, text in zip(older[0] + places, texts, strict=True):
        ids += rest[at:place] + text
        at = int(place)
    left = length - len(remarks) - len(listed) - len(ids)
    between = min(60, left // 2)
    ids += rest[at : at + left - between] + remarks + rest[at + left - between : at + left] + listed
    return np.array(ids, np.int64)
