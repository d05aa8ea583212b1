"""Multiple choice: what names an option, where it is looked for, and what is refused."""

from __future__ import annotations

import pytest
from choice_responses import CELL, FRESH, NAMED, NOTHING
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.reward.verifiers.choice import correct_label, grade_choice
from exprl_jax.reward.verifiers.math import MAX_ANSWER

SPEED = (("1", r"$3.5\,\text{m/s}$"), ("2", r"$9.8 \times 10^{-2}$ m/s"), ("3", "7/2 m/s"), ("4", "3 m/s"))
UNITS = (("a", "mA"), ("b", "MA"), ("c", "same"), ("d", "same"))
LETTERS = (("A", "B"), ("B", "N"), ("C", "O"), ("D", "A"))

NAMES_B = [
    r"\boxed{B}",
    r"\boxed{\text{B}}",
    r"\boxed{(B)}",
    r"\boxed{\textbf{(B)}}",
    r"\boxed{\mathrm{\textbf{B}}}",
    r"\boxed{b}",
    r"\boxed{B.}",
    r"\boxed{\text{Option B}}",
    r"\boxed{\text{B. the mitochondrion}}",
    r"\boxed{\textbf{(B)}\ \text{the powerhouse}}",
    r"\boxed{\text{The Mitochondrion}}",
    r"\boxed{\text{the}\ mitochondrion.}",
    r"\boxed{B \text{ because A and C are wrong}}",
    "Final Answer: B",
    "final answer: b",
    "**Final Answer:** B",
    "Final Answer: **B**",
    "*Answer:* B",
    "Answer: (B)",
    "Answer: B.",
    "Answer: $B$",
    "Answer: Option B",
    "Answer: [B]",
    "Answer: B, the powerhouse",
    "Answer: B, since A makes no energy",
    "Answer: the mitochondrion",
    "The correct answer is **B**.",
    "The correct answer is **B. the mitochondrion**.",
    "The answer is (B) the mitochondrion.",
    "So the correct option is B.",
    "the best choice is: B",
    "The answer is option B",
    "### Final Answer\n\nB",
    "**Answer:**\n\n(B)\n",
    "The answer must be the mitochondrion.",
    "We see A. **B** it is.",
    "So **(B)**.",
    "It is\nB",
    "It is\n(B)\n\n",
    "It is\n**B**",
    r"It is $\mathbf{B}$.",
    "A\nB",
    "(b).",
]
NAMES_SEVERAL_OR_NONE = [
    r"\boxed{B, C}",
    r"\boxed{A and B}",
    r"\boxed{B \text{ or } C}",
    r"\boxed{B/C}",
    r"\boxed{B & C}",
    r"\boxed{B; C}",
    r"\boxed{BC}",
    r"\boxed{\text{B. the nucleus}}",
    r"\boxed{\text{B. C. D}}",
    r"\boxed{\text{the nucleus or the mitochondrion}}",
    r"\boxed{B \text{ or } E}",
    r"\boxed{B, 5}",
    r"\boxed{E}",
    r"\boxed{}",
    r"\boxed{ }",
    r"\boxed{\text{the cell}}",
    r"\boxed{42}",
    "Answer: B or C",
    "Answer: both A and B",
    "The answer is B or C.",
    "Answer: E",
    "Answer: unknown",
    "Answer:",
    "The answer is 42.",
    "The answer is A nucleus",
    "Final Answer: B or (C)",
    "B or C",
    "B, C",
    "**B** or **C**",
    "(A) and (B)",
    r"\boxed{" + "B" * (MAX_ANSWER + 99) + "}",
]
NAMES_NOTHING = [
    "",
    " \n ",
    "I do not know.",
    "The powerhouse is the mitochondrion.",
    "We compare B with C.",
    "B\nis what I think",
    r"\boxed{B",
    "It is not **B**.",
    "It cannot be **B**",
    "the mitochondrion",
    "The answer is consistent with A.",
    "AB",
    "Grade: B",
]


def verdicts(texts, choices=CELL, answer="B"):
    return {text[:60]: grade_choice(text, answer, choices).value for text in texts}


def test_what_names_an_option():
    assert set(verdicts(NAMES_B).values()) == {"correct"}, verdicts(NAMES_B)
    assert set(verdicts(NAMES_B, answer="A").values()) == {"wrong"}


def test_what_names_several_options_or_none_is_unparsable():
    assert set(verdicts(NAMES_SEVERAL_OR_NONE).values()) == {"unparsable"}, verdicts(NAMES_SEVERAL_OR_NONE)


def test_what_has_no_answer():
    assert set(verdicts(NAMES_NOTHING).values()) == {"no_answer"}, verdicts(NAMES_NOTHING)


@pytest.mark.parametrize(
    "response",
    [
        "Answer: A\n" + r"\boxed{B}" + "\nC",  # the box before everything
        r"\boxed{A} and then \boxed{B}",  # the last of them
        "Answer: A\nFinal Answer: B\nA",  # a final-answer line before the last line, the last of them
        "Answer: B\nThe answer is consistent with A.\nA",  # prose is no final-answer line
        "The answer is A, no: the answer is B",  # the last mark of a line
        "A\n\nB\n \n",  # the last line that is not empty
    ],
)
def test_the_first_place_that_has_an_answer_decides(response):
    assert grade_choice(response, "B", CELL) == "correct"


def test_an_unreadable_box_or_line_is_not_skipped_for_a_readable_one():
    for response in (r"Answer: B \boxed{?}", "Answer: B\nFinal Answer: 17\nB", "The answer is B.\nThe answer is E."):
        assert grade_choice(response, "B", CELL) == "unparsable"


LABELLED = [(CELL, *pair) for pair in NAMED] + [(CELL, text, None) for text in NOTHING] + FRESH


@pytest.mark.parametrize("choices, response, label", LABELLED)
def test_what_a_response_names_is_what_a_reader_sees(choices, response, label):
    right = [each for each, _ in choices if grade_choice(response, each, choices) == "correct"]
    assert right == ([label] if label else [])


@pytest.mark.parametrize("before", ["", "The answer is B.\n", r"\boxed{B}" + "\n", "<answer>B</answer>\n"])
@pytest.mark.parametrize("end", [r"\boxed{C", r"so \boxed {\text{B", "<answer>C", "<final_answer>B"])
def test_a_response_that_breaks_off_within_its_answer_has_none(before, end):
    assert grade_choice(before + end, "B", CELL) == "no_answer"


@pytest.mark.parametrize(
    "box, label",
    [
        ("1", "1"),
        ("(2)", "2"),
        ("2.", "2"),
        ("3.5 m/s", "1"),
        (r"3.5\ \mathrm{m/s}", "1"),
        (r"9.8\times10^{-2}\,\text{ m/s}", "2"),
        (r"9.8 × 10^-2 m/s", "2"),
        (r"\frac{7}{2} \text{ m/s}", "3"),
        (r"\dfrac{7}{2}\text{m/s}", "3"),
        ("3 m/s", "4"),
        ("3 m/s.", "4"),
        ("3.5", None),
        ("2.5 m/s", None),
        ("2 m/s", None),
        ("1,000", None),
        ("1/2", None),
        ("2, 3", None),
        ("-2", None),
        ("2 - 3", None),
    ],
)
def test_labels_that_are_numbers_are_not_taken_from_numbers(box, label):
    for each, _ in SPEED:
        expected = "unparsable" if label is None else "correct" if each == label else "wrong"
        assert grade_choice(rf"\boxed{{{box}}}", each, SPEED) == expected


def test_case_decides_only_where_nothing_matches_better():
    assert [grade_choice(rf"\boxed{{{text}}}", "b", UNITS).value for text in ("MA", "mA", "ma", "B")] == [
        "correct",
        "wrong",
        "unparsable",
        "correct",
    ]


def test_a_text_of_two_options_is_unparsable_unless_a_label_stands_by_it():
    assert [grade_choice(rf"\boxed{{{text}}}", "d", UNITS).value for text in ("same", "d", "d. same", "a. same")] == [
        "unparsable",
        "correct",
        "correct",
        "unparsable",
    ]


def test_the_text_of_an_option_is_that_option_even_where_it_looks_like_a_label():
    assert [grade_choice(rf"\boxed{{{text}}}", "A", LETTERS).value for text in ("B", "(B)", "(A)", "A", "N")] == [
        "correct",
        "wrong",
        "correct",
        "wrong",
        "wrong",
    ]


@pytest.mark.parametrize(
    "answer, choices, label",
    [
        ("B", CELL, "B"),
        (" B ", CELL, "B"),
        ("b", CELL, "B"),
        ("(B)", CELL, "B"),
        ("the mitochondrion", CELL, "B"),
        ("The mitochondrion.", CELL, "B"),
        ("the nucleus and the mitochondrion", CELL, "C"),
        ("3.5 m/s", SPEED, "1"),
        ("3", SPEED, "3"),
        ("B", LETTERS, "B"),
        ("N", LETTERS, "B"),
        ("MA", UNITS, "b"),
    ],
)
def test_the_right_option_is_given_by_label_or_by_text(answer, choices, label):
    assert correct_label(answer, choices) == label


@pytest.mark.parametrize(
    "answer, choices, message",
    [
        ("E", CELL, "'E' is not an option: expected one of the labels A, B, C, D"),
        ("the cell", CELL, "not an option"),
        ("", CELL, "not an option"),
        ("A or B", CELL, "several options"),
        ("same", UNITS, "several options"),
        ("A", (), "not an option"),
        ("A", (("A", "x"), ("A", "y")), "share a label: got A, A"),
    ],
)
def test_an_answer_that_is_no_option_is_refused(answer, choices, message):
    for door in (lambda: correct_label(answer, choices), lambda: grade_choice("B", answer, choices)):
        with pytest.raises(ValueError, match=message) as caught:
            door()
        assert "\n" not in str(caught.value)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.lists(st.from_regex(r"[a-z]{4,8}( [a-z]{4,8}){0,2}", fullmatch=True), min_size=2, max_size=9, unique=True),
    st.sampled_from(["ABCDEFGHIJ", "abcdefghij", "123456789"]),
    st.sampled_from(
        [r"\boxed{%s}", r"\boxed{(%s)}", r"\boxed{\text{%s}}", "Final Answer: %s", "Answer: **%s**", "It is:\n(%s)"]
    ),
    st.integers(min_value=0),
)
def test_what_is_written_is_what_is_read(texts, labels, form, index):
    choices = tuple(zip(labels, texts, strict=False))
    label, text = choices[index % len(choices)]
    for other, _ in choices:
        expected = "correct" if other == label else "wrong"
        assert grade_choice(form % label, other, choices) == expected
        if form != "It is:\n(%s)":
            assert grade_choice(form % f"{label}. {text}", other, choices) == expected
            assert grade_choice((form % text).replace("(", "").replace(")", ""), other, choices) == expected


PIECES = [r"\boxed{", "}", "{", "Answer:", "answer is", "\n", "B", "C", "(", ")", "**", " or ", ",", " ", "$"]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25))
def test_a_response_is_right_for_at_most_one_option(pieces):
    response = "".join(pieces)
    got = [grade_choice(response, label, CELL).value for label, _ in CELL]
    assert got.count("correct") <= 1 and len(set(got) - {"correct", "wrong"}) <= 1
    assert ("correct" in got) == ("wrong" in got)


HOSTILE = [
    "the answer is so\n" * 10_000,
    "Answer: " * 125_000,
    "Answer: " + "B or " * 200_000,
    "answer" + " " * 1_000_000,
    "\n" * 1_000_000,
    " " * 1_000_000,
    "**" * 500_000,
    r"\boxed{" * 150_000,
    "(" * 1_000_000,
    r"\text{" * 160_000,
    r"\boxed{" + "B, " * 300_000 + "}",
    r"\boxed{" + r"\text{" * 300 + "B" + "}" * 301,
    "Answer: " + "B. " * 600,
    "Answer: " + "answer:" * 250,
    "final " * 160_000,
    "<answer>" * 120_000,
    "</answer>" * 110_000,
    '{"answer": ' * 90_000,
    '{"answer": ' + "[" * 900_000 + "}",
    "B is correct. " * 70_000,
    "B is correct.\n" * 70_000,
    "A is wrong,\n" * 80_000,
    "not A, B, C, " * 150,
    "Answer: " + "A, B, " * 300,
    "Answer: " + "so " * 600 + "B",
    "~~" * 500_000,
    "⟦1⟧ is correct. " * 100,
]


@pytest.mark.parametrize("response", HOSTILE, ids=lambda text: repr(text[:20]))
def test_a_hostile_megabyte_is_read_in_linear_time(response):
    """A quadratic reading of any of them would take hours."""
    assert grade_choice(response, "A", CELL) != "correct"
