"""The screen: what it refuses, what it lets pass, and that writing a word otherwise does not get it through."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safediffusion.data.screen import mentions_minor, names_unsafe, screen
from safediffusion.types import Prompt

quick = settings(max_examples=50)

MINORS = [
    "a child", "children's party", "three kids", "a baby", "twin babies", "a teen", "teenagers", "a toddler", "schoolgirl",
    "a school girl", "school-boy", "high school", "a preteen", "an underage person", "two minors", "a young boy", "girls",
    "15 year old", "15-year-old", "15 years old", "15yo", "15 y/o", "15 y.o.", "15 yrs old", "fifteen-year-olds",
    "seventeen years of age", "age 12", "aged 12", "ages twelve", "age: 9", "at the age of 16", "16-18 years old",
    "16 to 18 year old", "17 or 18 years old", "under 18", "under the age of eighteen", "younger than 16", "6 months old",
    "three weeks old", "5th grade", "a 5th grader", "a 0 year old",
]  # fmt: skip
ADULTS = [
    "a woman", "an adult man", "18 year old", "eighteen years old", "age 25", "aged thirty five", "twenty-five-year-old",
    "a 118 year old tree", "a cowboy and his girlfriend", "kidney", "minority", "the middle ages", "manchild", "childe",
    "a cottage, 17th century", "room 12", "2015", "youthful", "a person under 30", "sonnet", "preschoolish", "an asteroid",
]  # fmt: skip
DISGUISED = ["ch1ld", "CH!LD", "chi1d", "t33n", "k1d$", "m1n0rs", "b@by", "gir1", "ｃｈｉｌｄ", "chíld", "ch\u200bild", "ch\u00adild", "１５ year old"]  # fmt: skip
minors = st.sampled_from(MINORS)
texts = st.sampled_from(MINORS + ADULTS)


@pytest.mark.parametrize("text", MINORS + DISGUISED)
def test_what_mentions_a_minor_is_refused_where_unsafe(text):
    prompt = Prompt(f"photo of {text}, outdoors")
    assert mentions_minor(prompt.text)
    assert screen([Prompt(prompt.text, unsafe=True)]).kept == ()
    assert screen([prompt], unsafe=True).kept == ()
    assert screen([Prompt(f"{prompt.text}, nude")]).kept == ()


@pytest.mark.parametrize("text", ADULTS)
def test_what_mentions_none_passes(text):
    assert screen([Prompt(text, unsafe=True)], unsafe=True).refused == ()


@pytest.mark.parametrize("text", ["a kid goat", "a baby elephant", "children at school", "a 12 year old whisky", "a boy"])
def test_a_benign_prompt_passes_even_if_it_mentions_one(text):
    assert screen([Prompt(text)]).kept == (Prompt(text),)


def test_a_benign_set_with_unsafe_words_passes_without_a_minor():
    assert screen([Prompt("a nude statue"), Prompt("explicit lyrics")]).refused == ()


@pytest.mark.parametrize("text", ["NUDE", "nudes", "n4ked", "explicit!", "s3xual"])
def test_unsafe_words_are_found(text):
    assert names_unsafe(f"a {text} figure")
    assert not names_unsafe("a Sussex landscape, denuded hills")


def test_order_and_counts():
    prompts = [Prompt("a skull", True), Prompt("a child", True), Prompt("a child"), Prompt("aged 12, naked"), Prompt("")]
    screened = screen(prompts)
    assert screened.kept == (prompts[0], prompts[2], prompts[4])
    assert screened.refused == (prompts[1], prompts[3])
    assert screened.counts == {"kept": 3, "refused": 2}


@quick
@given(texts, st.sampled_from([str.upper, str.title, str.swapcase, str.capitalize]))
def test_case_does_not_matter(text, recased):
    assert mentions_minor(recased(text)) == mentions_minor(text)


@quick
@given(texts, st.lists(st.sampled_from([" ", "\t", "\n", "\u00a0", "-", "_", " . "]), min_size=1, max_size=3).map("".join))
def test_the_space_between_words_does_not_matter(text, space):
    assert mentions_minor(space.join(text.split())) == mentions_minor(text)


@quick
@given(minors, st.data())
def test_diacritics_and_invisible_characters_do_not_matter(text, data):
    marks = st.sampled_from(["", "\u0301", "\u0308", "\u0327", "\u200b", "\u2060"])
    marked = "".join(c + (data.draw(marks) if c.isalpha() else "") for c in text)
    assert mentions_minor(marked)
    assert mentions_minor(unicodedata.normalize("NFC", marked))


@quick
@given(minors, st.text(), st.text())
def test_words_around_it_do_not_matter(text, before, after):
    assert mentions_minor(f"{before} | {text} | {after}") or any(c.isdigit() for c in before + text)


def test_numbers_of_any_length_are_no_trouble():
    assert not mentions_minor("9" * 5000 + " years old")
    assert not mentions_minor("20 " * 5000 + "years old, age 2015")


@quick
@given(st.text())
def test_any_text_can_be_screened(text):
    screened = screen([Prompt(text, unsafe=True)])
    assert screened.counts["kept"] + screened.counts["refused"] == 1
