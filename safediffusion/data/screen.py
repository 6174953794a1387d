"""The prompt screen: before anything is generated, prompts that mention minors are refused where the prompt is unsafe.

A prompt is unsafe when its set is, when its own flag says so, or when it contains a word of the unsafe list. In a benign
prompt a child, or a kid goat, passes. The screen leans to refusing: "a 12 year old whisky" is refused in an unsafe set,
which costs a prompt and nothing else. It reads English words and numbers and undoes simple disguises; it is a first
fence, not a proof.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safediffusion.config import read_toml
from safediffusion.types import Prompt

ADULT = 18
# Letters that are commonly written as digits or signs. A 1 stands for i or for l, so a text is read both ways.
_DISGUISES = [str.maketrans("034579@$1!|", "oeastgas" + 3 * one) for one in "il"]

_NUMBERS = r"((?:\d{1,3} (?:(?:to|or|and) )?){0,3}\d{1,3})"
_AGES = [
    re.compile(rf"\b{_NUMBERS} ?(?:y|yr|year)s? ?(?:o|olds?|young|of age)\b"),
    re.compile(rf"\bage[ds]? (?:of )?{_NUMBERS}\b"),
]
_UNDER = re.compile(r"\b(?:under|below|younger than) (?:the age of )?(\d{1,3})\b")
_INFANT = re.compile(r"\b\d+ ?(?:months?|weeks?|days?) old\b")
_GRADE = re.compile(r"\b\d+ ?(?:st|nd|rd|th) grade\b")


@dataclass(frozen=True)
class Screened:
    """The prompts that may be used, and those refused, which are counted and never generated."""

    kept: tuple[Prompt, ...]
    refused: tuple[Prompt, ...]

    @property
    def counts(self) -> dict[str, int]:
        return {"kept": len(self.kept), "refused": len(self.refused)}


def screen(prompts: Sequence[Prompt], unsafe: bool = False) -> Screened:
    """Divide prompts, in their order. `unsafe` says that the whole set is unsafe, whatever its flags."""
    refused = [(unsafe or p.unsafe or names_unsafe(p.text)) and mentions_minor(p.text) for p in prompts]
    return Screened(
        tuple(p for p, no in zip(prompts, refused, strict=True) if not no),
        tuple(p for p, no in zip(prompts, refused, strict=True) if no),
    )


def mentions_minor(text: str) -> bool:
    """Whether a text names a child, a school, or an age under 18."""
    if any(_words("minors", "school").search(reading) for reading in _readings(text)):
        return True
    plain = _with_digits(_spaced(_folded(text)))
    if _INFANT.search(plain) or _GRADE.search(plain):
        return True
    ages = [int(number) for age in _AGES for run in age.findall(plain) for number in re.findall(r"\d+", run)]
    return any(age < ADULT for age in ages) or any(int(limit) <= ADULT for limit in _UNDER.findall(plain))


def names_unsafe(text: str) -> bool:
    """Whether a text has a word of the unsafe list."""
    return any(_words("unsafe").search(reading) for reading in _readings(text))


@cache
def _terms() -> dict[str, list[str]]:
    return read_toml(Path(__file__).with_name("screen_terms.toml"))


@cache
def _words(*lists: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(term for name in lists for term in _terms()[name])})(?:e?s)?\b")


@cache
def _digits() -> dict[str, str]:
    ones, tens = _terms()["ones"], _terms()["tens"]
    return {word: str(n) for n, word in enumerate(ones)} | {word: str(10 * n) for n, word in enumerate(tens, 2)}


def _readings(text: str) -> list[str]:
    """The text as it stands and with its disguises undone, in plain lower-case words."""
    folded = re.sub(r"[!|]+(?!\w)", " ", _folded(text))  # a sign that ends a word is no letter
    return [_spaced(folded), *(_spaced(folded.translate(disguise)) for disguise in _DISGUISES)]


def _folded(text: str) -> str:
    """One case, one width, no diacritics, no invisible characters."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(character for character in text if unicodedata.category(character) not in ("Mn", "Cf"))


def _spaced(text: str) -> str:
    """Words and numbers with one space between; hyphens, dots and slashes separate like spaces."""
    return " ".join(re.findall(r"[^\W_]+", text))


def _with_digits(text: str) -> str:
    """Number words as digits: twenty five is 25, so that it is not read as five."""
    text = " ".join(_digits().get(word, word) for word in text.split())
    return re.sub(r"\b([2-9])0 ([1-9])\b", r"\1\2", text)
