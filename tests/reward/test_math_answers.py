"""Answers as they are read: numbers, words, units and formulas against oracles of their own."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from types import SimpleNamespace

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import grader as agreement
from exprl_jax.reward.verifiers import grading
from exprl_jax.reward.verifiers.math import is_readable, last_boxed
from exprl_jax.reward.verifiers.math_answers import expression, number_words, numerals, units
from exprl_jax.reward.verifiers.math_answers.identity import proportional, same_value
from exprl_jax.reward.verifiers.math_answers.tokens import tokenize
from exprl_jax.reward.verifiers.math_worker import compare

x, y, n = sympy.symbols("x y n")

# --- numbers ---------------------------------------------------------------------------------------------------------

ONES = "zero one two three four five six seven eight nine ten eleven twelve".split() + [
    stem + "teen" for stem in "thir four fif six seven eigh nine".split()
]
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(number: int, joint: str) -> list[str]:
    """English words, by the schoolbook; `joint` behind hundreds."""
    if number < 20:
        return [ONES[number]]
    if number < 100:
        return [TENS[number // 10 - 2]] + ([ONES[number % 10]] if number % 10 else [])
    for size, name in [(10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")]:
        if number >= size:
            rest = spelled(number % size, joint) if number % size else []
            return spelled(number // size, joint) + [name] + (joint.split() if rest and size == 100 else []) + rest
    raise AssertionError(number)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.one_of(st.integers(0, 1200), st.integers(0, 10**12 - 1)), st.sampled_from(["", "and"]))
def test_spelled_numbers_are_read(number, joint):
    words = spelled(number, joint)
    assert number_words.number(tuple(words)) == number
    assert compare(rf"\text{{{'-'.join(words)}}}", str(number)) == "correct"
    assert compare("-".join(words), str(number)) == "correct"
    assert compare(rf"\text{{{' '.join(words)}}}", str(number + 1)) == "wrong"


@pytest.mark.parametrize(
    "answer, reference", [("x-one", "x"), ("five-two", "3"), ("seven-two", "72"), ("a-b", "b-a"), ("n-one", "n")]
)
def test_a_hyphen_joins_words_alone(answer, reference):
    assert compare(answer, reference) == "wrong"


@pytest.mark.parametrize(
    "words",
    ["five six", "hundred hundred", "two three", "and five", "twenty twenty", "a", "million thousand", "ten one"],
)
def test_words_in_a_row_are_no_number(words):
    assert number_words.number(tuple(words.split())) is None


@pytest.mark.parametrize("place", range(1, 100))
def test_ordinals_are_read_and_are_no_numbers(place):
    last = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
    *before, word = spelled(place, "")
    word = last.get(word, "twelfth" if word == "twelve" else word.removesuffix("y") + "ie" * word.endswith("y") + "th")
    assert number_words.ordinal([*before, word]) == place
    ordinal = f"{place}{number_words.suffix(place)}"
    assert compare(rf"\text{{{' '.join([*before, word])}}}", ordinal) == "correct"
    assert compare(ordinal, str(place)) == compare(str(place), ordinal) == "wrong"


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.integers(1000, 10**15),
    st.sampled_from([",", "{,}", r"\,", r"\ ", "~", " ", "'", "_", r"\!", r",\!", r"\thinspace "]),
    st.sampled_from(["", ".5", ".125"]),
)
def test_groups_of_digits_are_one_number(number, separator, decimals):
    (token,) = tokenize(f"{number:,}".replace(",", separator) + decimals)
    assert numerals.value(token.text) == number + Fraction("0" + decimals)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(0, 99), st.text("0123456789", max_size=3), st.text("0123456789", min_size=1, max_size=4))
def test_repeating_decimals_are_their_fractions(whole, decimals, period):
    # Summed digit by digit: what is left after 60 of them is below 10^-59.
    digits = (decimals + period * 60)[:60]
    nearly = whole + Fraction(int(digits), 10**60)
    for text in (rf"{whole}.{decimals}\overline{{{period}}}", f"{whole}.{decimals}({period})"):
        (token,) = tokenize(text)
        assert 0 <= numerals.value(token.text) - nearly < Fraction(1, 10**59)


# --- units -----------------------------------------------------------------------------------------------------------

# From NIST's Guide to the SI, appendix B.
FACTORS = [
    ("mi", "m", "1609.344"),
    ("ft", "cm", "30.48"),
    ("lb", "g", "453.59237"),
    ("oz", "g", "28.349523125"),
    ("gal", "L", "3.785411784"),
    ("mph", "km/h", "1.609344"),
    ("knot", "km/h", "1.852"),
    ("atm", "Pa", "101325"),
    ("bar", "kPa", "100"),
    ("kWh", "MJ", "3.6"),
    ("cal", "J", "4.184"),
    ("eV", "J", "1.602176634e-19"),
    ("hectare", "m^2", "10000"),
    ("ly", "m", "9460730472580800"),
    ("tonne", "kg", "1000"),
    ("G", "T", "0.0001"),
    ("L", "cm^3", "1000"),
    ("week", "h", "168"),
    ("N", "kg m/s^2", "1"),
    ("W", "J/s", "1"),
    ("V", "W/A", "1"),
    (r"\Omega", "V/A", "1"),
]


@pytest.mark.parametrize("unit, other, factor", FACTORS)
def test_units_are_converted_exactly(unit, other, factor):
    assert compare(rf"\text{{3 {unit}}}", rf"\text{{{3 * Fraction(factor)} {other}}}") == "correct"
    assert compare(rf"\text{{3 {unit}}}", rf"\text{{{3 * Fraction(factor) * Fraction('1.0001')} {other}}}") == "wrong"
    assert compare(rf"\text{{3 {unit}}}", rf"3\text{{ {'kg' if other != 'kg' else 's'}}}") == "wrong"


def test_no_everyday_word_is_a_unit():
    words = (
        "a as at be has he hers in us is it me mine no now on pm am so the us was ways people apples times dots".split()
    )
    assert [word for word in words if units.find(word)] == ["in"]


# --- formulas --------------------------------------------------------------------------------------------------------


def random_formula(rng: random.Random, depth: int) -> sympy.Expr:
    if depth == 0:
        return rng.choice([x, y, sympy.Integer(rng.randint(1, 9)), sympy.Rational(rng.randint(1, 9), 7), sympy.pi])
    a, b = (random_formula(rng, depth - 1) for _ in range(2))
    makers = [
        lambda: a + b,
        lambda: a - b,
        lambda: a * b,
        lambda: a / b,
        lambda: a**2,
        lambda: sympy.sqrt(a),
        lambda: sympy.sin(a),
        lambda: sympy.exp(a),
        lambda: sympy.Abs(a),
        lambda: sympy.log(a),
        lambda: -a,
        lambda: a ** (b / 3),
    ]
    return rng.choice(makers)()


@pytest.mark.parametrize("seed", range(150))
def test_what_sympy_prints_is_read_back(seed):
    rng = random.Random(seed)
    formula = random_formula(rng, 3)
    if formula.has(sympy.zoo, sympy.nan, sympy.re, sympy.im):
        pytest.skip("no formula that is written so")
    text = sympy.latex(formula, ln_notation=True, mul_symbol=rng.choice(["dot", "times", None]))
    value = expression.parse(tokenize(text))
    assert same_value(value, formula), text
    assert not same_value(value, formula + sympy.Rational(1, 10**12)), text


@pytest.mark.parametrize(
    "a, b, same",
    [
        (x + 2**2024, sympy.Integer(2) ** 2024, False),
        (x + sympy.Rational(1, 10**60), x, False),
        (sympy.sqrt(2) + sympy.Rational(1, 10**75), sympy.sqrt(2), False),
        (sympy.sqrt(3 - 2 * sympy.sqrt(2)), sympy.sqrt(2) - 1, True),
        (sympy.log(x * y), sympy.log(x) + sympy.log(y), True),
        (sympy.sqrt(x**2), x, False),
        (sympy.Abs(x), sympy.sqrt(x**2), True),
        (sympy.floor(n / 2) + sympy.ceiling(n / 2), n, True),
        (sympy.floor(x / 2) + sympy.ceiling(x / 2), x, False),
        ((-1) ** (2 * n), sympy.Integer(1), True),
        ((-1) ** (2 * x), sympy.Integer(1), False),
        (sympy.exp(-1000 * x**2), sympy.Integer(0), False),
        (x**1000, x**1000 + 1, False),
        (sympy.asin(x), sympy.pi / 2 - sympy.acos(x), True),
        (sympy.Function("f")(x), sympy.Function("f")(x) + 1, False),
        (sympy.ImmutableMatrix([[x, 1]]), sympy.ImmutableMatrix([[x], [1]]), False),
        (sympy.oo, -sympy.oo, False),
    ],
)
def test_identities(a, b, same):
    assert same_value(a, b) is same and same_value(b, a) is same


def test_equations_are_proportional_inequalities_positively_so():
    assert proportional(y - 2 * x - 3, 6 + 4 * x - 2 * y) and not proportional(y - 2 * x - 3, 2 * x - y - 3)
    assert proportional(x**2 / 4 + y**2 / 9 - 1, 9 * x**2 + 4 * y**2 - 36)
    assert proportional(x - y, 2 * x - 2 * y, positive=True) and not proportional(x - y, y - x, positive=True)


# --- every token counts ----------------------------------------------------------------------------------------------

TAILS = [
    r"\text{ minus 1}", r"\text{ or } 8", r"\text{ is wrong}", r"\text{ dozen}", r"\text{ million}",
    r"\text{, I think}",
    r"\text{ is not the answer}", r"\text{ or more}", " or 77", ", 77", r"\text{ if } x>5", r"\text{ except } 3", ":2",
    r"\text{ fewer}", r"\text{ at most}", r"\text{ to }9", "=77", r"\text{ thousandths}", r"\ldots", r"\cdot 2",
    r"\text{ hmm}",
]  # fmt: skip
HEADS = [
    r"\text{not }", r"\text{at least }", "-", r"\text{more than }", r"\text{half of }", r"\text{no }", "x+", "77=",
    r"\neg ", r"\text{the opposite of }", r"\text{nearly }",
]  # fmt: skip
PLAIN_KINDS = {
    "integer",
    "fraction",
    "decimal",
    "surd",
    "power",
    "unit",
    "GSM8K",
    "separators",
    "number words",
    "money",
}


def test_right_answers_with_more_said_are_not_right():
    added = []
    for pair in agreement.read_pairs():
        if pair["kind"] != "math" or pair["label"] != "correct" or pair["form"] not in PLAIN_KINDS:
            continue
        box, answer = last_boxed(pair["response"]), pair["answer"]
        if compare("0", answer) == "correct":  # no minus, no factor changes it
            continue
        rng = random.Random(box)
        for text in [box + tail for tail in rng.sample(TAILS, 5)] + [head + box for head in rng.sample(HEADS, 3)]:
            added += [(text, answer)] if compare(text, answer) == "correct" else []
    assert added == []


def test_answers_of_one_problem_are_not_those_of_another():
    rng = random.Random(0)
    pairs = [pair for pair in agreement.read_pairs() if pair["kind"] == "math" and pair["label"] == "correct"]
    pairs = [(last_boxed(pair["response"]), pair["answer"]) for pair in pairs if pair["form"] in PLAIN_KINDS]
    for _ in range(3000):
        (box, answer), (other_box, other) = rng.sample(pairs, 2)
        if compare(box, other) == "correct":
            # Then their references say the same, at least in one direction, or leave a unit out.
            agrees = {compare(answer, other), compare(other, answer), compare(other_box, answer)}
            plain = not any(letter.isalpha() or letter in "$%" for letter in other)
            assert "correct" in agrees or plain, (box, other)


# --- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, readable",
    [("12", True), (r"\boxed{12}", True), (r"\emptyset", True), (r"\text{no}", True), (r"\pi", True)]
    + [("", False), ("  ", False), ("$$", False), ("((", False), (r"\frac{1}{}", False), ("?", False), (r"{1", False)],
)
def test_readable_references(answer, readable):
    assert is_readable(answer) is readable
    assert (compare("12", answer) == "unparsable") is not readable


def test_references_that_nothing_equals_are_named(capsys):
    problem = SimpleNamespace(kind="math")
    problems = [
        SimpleNamespace(kind="math", id=f"p{i}", answer=answer) for i, answer in enumerate(["1", "", "((", "yes"])
    ]
    grading.check_answers(problems)
    assert "2 of 4 problems have an answer that the grader cannot read" in capsys.readouterr().err
    grading.check_answers([SimpleNamespace(**vars(problem), id="p", answer="7")])
    assert capsys.readouterr().err == ""


def test_the_pairs_are_labelled_once():
    seen = {}
    for pair in agreement.read_pairs():
        key = json.dumps([pair["response"], pair["answer"], pair.get("choices")])
        assert seen.setdefault(key, pair["label"]) == pair["label"], pair
