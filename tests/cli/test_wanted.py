"""Prompts, classes, seeds, sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditloom.cli.wanted import guidance_of, inputs_of, read_prompts, seeds_of, size_of
from ditloom.contracts.errors import UserError
from tests.cli.tiny import CLASSES, tiny


def test_classes_by_name_number_and_all():
    model = tiny()
    assert inputs_of(model, (), None, "all") == list(CLASSES)
    assert inputs_of(model, (), None, "Ankle Boot, 0,1") == ["ankle boot", "ant", "bee"]
    assert inputs_of(model, ("bee", "2", ""), None, None) == ["bee", "ankle boot", None]
    assert inputs_of(model, (), None, None) == [None]
    numbered = tiny(conditioner={"name": "labels", "num_classes": 3})
    assert inputs_of(numbered, ("2",), None, None) == [2]


@pytest.mark.parametrize("asked", [{"prompts": ("wasp",)}, {"classes": "ant,wasp"}, {"classes": "7"}])
def test_an_unknown_class_is_refused_before_anything_is_drawn(asked):
    with pytest.raises(UserError, match="wasp.*known are|class 7 does not exist"):
        inputs_of(tiny(), asked.get("prompts", ()), None, asked.get("classes"))


def test_a_model_without_classes_takes_none(tmp_path):
    free = tiny(backbone={**tiny().backbone.preset.to_dict(), "classes": 0}, conditioner={"name": "none"})
    with pytest.raises(UserError, match="tiny knows no classes"):
        inputs_of(free, (), None, "all")
    assert inputs_of(free, ("a",), None, None) == ["a"]


def test_two_ways_at_once_are_refused(tmp_path):
    with pytest.raises(UserError, match="prompts and --classes say twice"):
        inputs_of(tiny(), ("ant",), None, "bee")


def test_prompts_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein Apfel\r\n\n  two  \nünï\n".encode())
    assert read_prompts(file) == ["ein Apfel", "two", "ünï"]
    file.write_bytes(b"\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(file)
    with pytest.raises(UserError, match="No such file"):
        read_prompts(tmp_path / "none")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=6))
def test_seeds_are_listed_and_ranged(spans):
    wanted = [seed for first, more in spans for seed in range(first, first + more + 1)]
    text = ",".join(f"{first}-{first + more}" if more else str(first) for first, more in spans)
    if len(set(wanted)) == len(wanted):
        assert seeds_of(text, 99) == wanted
    else:
        with pytest.raises(UserError, match="each seed once"):
            seeds_of(text, 99)


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "3-1", "1,,2", "0-999999999999"])
def test_what_is_no_list_of_seeds_is_refused(text):
    with pytest.raises(UserError, match="--seeds"):
        seeds_of(text, 0)


def test_without_a_list_the_single_seed():
    assert seeds_of(None, 5) == [5]


def test_sizes_and_guidance():
    assert (size_of(None), size_of("64"), size_of("64X96")) == (None, 64, (64, 96))
    for text in ("", "0", "x", "64x", "1x2x3", "-4", "3.5"):
        with pytest.raises(UserError, match="--size"):
            size_of(text)
    assert (guidance_of(None), guidance_of("3"), guidance_of("cfg:scale=3")) == (None, 3.0, "cfg:scale=3")
