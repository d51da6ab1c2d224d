"""Verifiable instructions: every kind has a checker that accepts any response which follows it, as in IFEval."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from s2d2_lmeval.toy import Problem
from s2d2_lmeval.toy.scoring import COLORS

WORDS = (
    *COLORS, "cat", "dog", "sun", "moon", "tree", "fish", "bird", "rain", "snow", "wind", "lake", "hill", "road",
    "door", "lamp", "book", "milk", "salt", "king", "song", "ship", "star",
)  # fmt: skip
ENDINGS = ("that is all", "good night", "see you soon", "the end", "thank you", "have fun")
SEPARATORS = {"commas": ", ", "spaces": " ", "dashes": " - "}

Drawn = tuple[str, str, dict[str, Any]]
"""Instruction, reference response, arguments of the checker."""


def _some_words(rng: random.Random, least: int, most: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def _draw_repeat(rng: random.Random) -> Drawn:
    word, times, name = rng.choice(WORDS), rng.randint(2, 7), rng.choice(tuple(SEPARATORS))
    response = SEPARATORS[name].join([word] * times)
    return f"Write the word {word} {times} times, separated by {name}.", response, {"response": response}


def _draw_uppercase(rng: random.Random) -> Drawn:
    words = " ".join(_some_words(rng, 2, 4))
    return f"Write in capital letters: {words}.", words.upper(), {"response": words.upper()}


def _draw_bullets(rng: random.Random) -> Drawn:
    words = _some_words(rng, 2, 5)
    return f"Make a bullet list of {', '.join(words)}.", "\n".join(f"- {word}" for word in words), {"items": words}


def _draw_ending(rng: random.Random) -> Drawn:
    topic, ending = rng.choice(WORDS), rng.choice(ENDINGS)
    response = f"Here is the {topic}. {ending}"
    return f"Write about a {topic}. End with the phrase: {ending}.", response, {"topic": topic, "ending": ending}


def _draw_reverse(rng: random.Random) -> Drawn:
    words = _some_words(rng, 3, 6)
    response = " ".join(reversed(words))
    return f"Reverse the order of these words: {' '.join(words)}.", response, {"response": response}


def _draw_quotes(rng: random.Random) -> Drawn:
    words = " ".join(_some_words(rng, 2, 4))
    return f"Wrap in double quotes: {words}.", f'"{words}"', {"words": words}


def _draw_count(rng: random.Random) -> Drawn:
    first = rng.randint(1, 40)
    last = first + rng.randint(3, 8)
    return f"Count from {first} to {last}.", " ".join(map(str, range(first, last + 1))), {"first": first, "last": last}


def _draw_distinct(rng: random.Random) -> Drawn:
    """Many responses are right; the reference names the first colors of the list, so that there is one to learn."""
    number, avoid = rng.randint(2, 5), rng.sample(COLORS, rng.randint(1, 2))
    colors = [color for color in COLORS if color not in avoid][:number]
    instruction = f"Name {number} different colors, but not {' or '.join(avoid)}."
    return instruction, ", ".join(colors), {"number": number, "avoid": avoid}


KINDS: dict[str, Callable[[random.Random], Drawn]] = {
    "repeat": _draw_repeat,
    "uppercase": _draw_uppercase,
    "bullets": _draw_bullets,
    "ending": _draw_ending,
    "reverse": _draw_reverse,
    "quotes": _draw_quotes,
    "count": _draw_count,
    "distinct": _draw_distinct,
}
"""How each kind is drawn; :data:`s2d2_lmeval.toy.scoring.INSTRUCTIONS` says how responses are checked."""


def make_problem(rng: random.Random) -> Problem:
    """Draw an instruction of a random kind."""
    kind = rng.choice(tuple(KINDS))
    instruction, response, arguments = KINDS[kind](rng)
    return Problem(
        corpus="instructions",
        kind=kind,
        prompt=f"Instruction: {instruction}\nResponse:",
        answer=response,
        separator=" ",
        check=json.dumps(arguments),
    )
