"""Options as people write them."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditloom.cli.commands.generate import Generate
from ditloom.cli.flags import known_flags, parsed, sentence_of
from ditloom.contracts.errors import UserError

BOX = """╭─ Missing argument ───────────────────────╮
│ Missing value for argument '--steps'.    │
│ Expected 1 values.                       │
│ ──────────────────────────────────────── │
│ For full helptext, run ditloom a --help  │
╰──────────────────────────────────────────╯
"""


PLAIN = """ Value error
 ------------------------------------------
 Error parsing --steps: expected a number.

 Got errors:
 ------------------------------------------
"""


def generate(*arguments):
    return parsed(Generate, "generate", arguments)


def test_values_arrive_in_their_types():
    read = generate(
        "a cat", "a dog", "--steps", "7", "--guidance", "-1.5", "--using", "x:a=1", "--using", "y", "--out", "o"
    )
    assert read.prompt == ("a cat", "a dog") and read.steps == 7 and read.guidance == "-1.5"
    assert read.using == ("x:a=1", "y") and read.out == Path("o") and not read.json
    assert generate("--batch_size=4", "--json").batch_size == 4


def test_options_not_given_are_absent():
    read = generate()
    assert (read.prompt, read.steps, read.guidance, read.out, read.count) == ((), None, None, None, None)
    assert generate("").prompt == ("",)


def test_a_prompt_may_begin_with_dashes_after_a_bare_double_dash():
    assert generate("--seed", "3", "--", "--prompt--").prompt == ("--prompt--",)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--steps", "x"), "--steps: expected a whole number, got 'x'; ditloom generate --help lists the options"),
        (("--steps", "1.5"), "--steps: expected a whole number, got '1.5'"),
        (("--seed", "a"), "--seed: expected a whole number, got 'a'"),
        (("--steps",), "Missing value for argument '--steps'"),
        (("-x",), "unknown option -x of generate: known are --batch-size, "),
        (("--prompt", "a"), "did you mean --prompts"),
        (("--stpes=3",), "unknown option --stpes of generate: did you mean --steps"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence):
    with pytest.raises(UserError) as caught:
        generate(*arguments)
    assert str(caught.value).startswith(sentence) or sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(string.ascii_lowercase + "-", min_size=1, max_size=20))
def test_no_unknown_word_passes_as_an_option(word):
    flag = f"--{word}"
    if flag.strip("-") and flag not in known_flags(Generate):
        with pytest.raises(UserError, match="unknown option -.* of generate"):
            generate(flag)


def test_the_frame_around_a_complaint_is_taken_off():
    assert sentence_of(BOX) == "Missing value for argument '--steps'. Expected 1 values"
    coloured = BOX.replace("Missing value", "\x1b[31mMissing\x1b[0m value")
    assert sentence_of(coloured) == sentence_of(BOX)
    assert sentence_of(PLAIN) == "--steps: expected a number"
    assert sentence_of("") == "the options could not be read"
