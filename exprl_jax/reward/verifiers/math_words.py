"""English in answers: number words as a grammar, nouns that are counted, and statements that are one statement."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from fractions import Fraction

_UNITS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "lakh": 10**5, "crore": 10**7, "mn": 10**6, "bn": 10**9,
}  # fmt: skip
_COLLECTIVES = {"dozen": 12, "score": 20, "gross": 144, "pair": 2, "couple": 2}
_ORDINALS = {
    word: value
    for value, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
        "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth".split(),
        start=1,
    )
} | {word[:-1] + "ieth": value for word, value in _TENS.items()} | {
    word + "th": value for word, value in _SCALES.items() if len(word) > 2
}  # fmt: skip
_PARTS = {word: value for word, value in _ORDINALS.items() if value > 2} | {"half": 2, "quarter": 4}
_PLURALS = (
    {word + "s": word for word in (*_PARTS, *_SCALES, *_COLLECTIVES) if word not in ("half", "score", "gross")}
    | {"halves": "half"}
)  # fmt: skip

# Factors that stand behind a number: `3 million`, `7 dozen`, `7 tenths`.
_FACTORS = {word: Fraction(value) for word, value in (_SCALES | _COLLECTIVES).items()}
_FACTORS |= {plural: _FACTORS[word] for plural, word in _PLURALS.items() if word in _FACTORS}
_FACTORS |= {plural: Fraction(1, _PARTS[word]) for plural, word in _PLURALS.items() if word in _PARTS}

NUMBER_WORDS = {*_UNITS, *_TENS, *_SCALES, *_COLLECTIVES, *_PARTS, *_PLURALS} - {"score", "mn", "bn"}
# Operations in words, read as their signs.
OPERATIONS = {
    "plus": "+", "minus": "-", "negative": "-", "times": "*", "over": "/", "per": "/", "squared": "^2", "cubed": "^3",
    "factorial": "!", "percent": "%", "choose": "choose",
}  # fmt: skip
APPROXIMATE = {"about", "approximately", "roughly", "around", "approx"}

# Words that no counted thing is called: the closed classes of English, and what says something about a number.
_CLOSED = set(
    """
    a an the this that these those some any all every each no none neither either both not never nor and or but if
    unless when while where whether because since so than then as is are was were be been being has have had do does
    did can could may might must shall should will would cannot isn wasn of in on at to from by for with without
    within into onto upon over under above below between among about around after before against across through
    during until except besides beyond near off out up down per via plus minus times i you he she it we they me him
    her us them my your his its our their who whom whose which what there here how why more most less least fewer
    fewest few many much several other another such same only just even also too very quite rather almost nearly
    roughly approximately exactly about possibly perhaps maybe probably always otherwise instead mod modulo base
    versus vs yes now ago hence thus therefore yet still again once twice thrice
    negative positive wrong incorrect false true correct right invalid impossible undefined unknown missing short
    squared cubed factorial choose percent percentage percentages percents root log sine cosine inverse reciprocal
    negatives inverses reciprocals opposites opposite powers power roots degrees halved doubled tripled divided
    multiplied increased decreased reduced rounded
    decrease loss drop reduction decline deficit debt owed discount decreases losses drops reductions deficits debts
    equals exceeds divides fails misses loses lacks contradicts holds works gives yields means seems appears becomes
    remains stays makes needs wants says satisfies violates differs results wins lies goes comes starts ends minuses
    sometimes afterwards backwards forwards upwards downwards inwards outwards onwards towards anyways themselves
    ourselves whereas others likes exists doubles factorials logarithms exponentials sums differences products
    quotients complements pluses twos threes fours fives sixes sevens eights nines tens ones zeros tenfold millionfold
    """.split()
)
_IRREGULAR = set(
    """
    people children men women mice geese teeth sheep fish deer dice oxen cattle data vertices matrices indices radii
    foci fungi cacti criteria phenomena bacteria series species police folk feet staff water milk money rice flour
    sugar work sleep homework feed increase profit change gain interest tip times fruit bread paper sand soil paint
    """.split()
)
# Things that are counted in ones and in parts, `1 apple` and `1/2 pizza`.
_SINGULAR = set(
    """
    apple orange egg cookie cake pie pizza slice piece person child boy girl man woman student teacher friend book
    page pencil pen ball card coin ticket car bus dog cat bird tree flower box bag bottle cup can jar room house
    table chair way solution root value point triangle square circle line side edge vertex face game team player
    match week trip lap unit item toy shirt marble candy sandwich hour day job task pound word letter digit
    """.split()
)
_BEHIND_NOUNS = set("each old long tall wide high deep away left total altogether apart remaining thick".split())
_BEFORE_NOUNS = set("more other different distinct additional extra possible such".split())
_TAIL = re.compile(
    r"(?: of(?: (?:the|a|an|his|her|their))?(?: \w+){1,3}| from \w+| in (?:total|all|length|height|width|area))?"
)


@functools.lru_cache(maxsize=4096)
def factor(word: str) -> Fraction | None:
    """What a word behind a number multiplies it by: `million`, `dozen`, `tenths`."""
    return _FACTORS.get(word.casefold())


@functools.lru_cache(maxsize=4096)
def read_number(words: tuple[str, ...]) -> Fraction | None:
    """The number that lower-case words spell, all of them; None where they spell none.

    number   = whole ["and" part] | part | whole "point" digit...
    part     = (whole | "a") ("half" | "thirds" | ...) | "half" ["a" | "of" "a"] ("dozen" | "million" | ...)
    whole    = (hundreds | "a") [scale] ["and"] ... with falling scales, [collective]
    """
    if not words or words[0] in ("a", "an") and len(words) == 1:
        return None
    if words[0] == "half" and len(words) > 1:
        rest = words[1 + (words[1] == "of") :]
        value = factor(rest[1]) if len(rest) == 2 and rest[0] in ("a", "an") else None
        return value / 2 if value and value > 1 else None
    if "point" in words:
        at = words.index("point")
        whole, digits = _whole(words[:at]), [_UNITS.get(word, 10) for word in words[at + 1 :]]
        if whole is None or not digits or max(digits) > 9:
            return None
        return whole + Fraction(int("".join(map(str, digits))), 10 ** len(digits))
    if words[-1] in _COLLECTIVES or words[-1] in ("dozens", "pairs", "couples"):
        count = _whole(words[:-1])
        return None if count is None else count * _FACTORS[words[-1]]
    whole = _whole(words)
    if whole is not None:
        return whole
    for at in range(len(words)):
        if words[at] == "and" and (first := _whole(words[:at])) is not None and (part := _part(words[at + 1 :])):
            return first + part
    return _part(words)


def _part(words: Sequence[str]) -> Fraction | None:
    if words == ("half",):
        return Fraction(1, 2)
    if len(words) < 2:
        return None
    name = _PLURALS.get(words[-1], words[-1])
    count = _whole(words[:-1])
    if count is None or name not in _PARTS or (count == 1) == (words[-1] in _PLURALS):
        return None
    return Fraction(count, _PARTS[name])


def _whole(words: Sequence[str]) -> Fraction | None:
    """A whole number: groups below a thousand, each with its scale, in falling order."""
    total, last, group = 0, math.inf, []
    for word in words:
        if word in _SCALES and word != "hundred":
            count = _below_thousand(group)
            if count is None or _SCALES[word] >= last:
                return None
            total, last, group = total + count * _SCALES[word], _SCALES[word], []
        else:
            group.append(word)
    if group and last < math.inf and group[0] == "and":
        group = group[1:]
    if not group and last < math.inf:
        return Fraction(total)
    count = _below_thousand(group)
    return None if count is None or count >= last or (last < math.inf and group[0] == "a") else Fraction(total + count)


def _below_thousand(words: Sequence[str]) -> int | None:
    words = list(words)
    if words in (["a"], ["an"]):
        return 1
    if "hundred" in words:
        at = words.index("hundred")
        head, tail = words[:at], words[at + 1 :]
        count = 1 if head in ([], ["a"]) else _UNITS.get(head[0]) if len(head) == 1 else None
        tail = tail[tail[:1] == ["and"] :]
        rest = _below_thousand(tail) if tail and "hundred" not in tail else 0 if words[at + 1 :] == [] else None
        return None if count is None or rest is None or not 0 < count < 20 else 100 * count + rest
    if len(words) == 1:
        return _UNITS.get(words[0], _TENS.get(words[0]))
    if len(words) == 2 and words[0] in _TENS and 0 < _UNITS.get(words[1], 0) < 10:
        return _TENS[words[0]] + _UNITS[words[1]]
    return None


def read_ordinal(words: Sequence[str]) -> int | None:
    """The place that words name, `twenty-first`, without an article; None where they name none."""
    if not words or words[-1] not in _ORDINALS:
        return None
    last = _ORDINALS[words[-1]]
    if len(words) == 1:
        return last
    if last in _SCALES.values():
        count = _below_thousand(words[:-1])
        return None if count is None else count * last
    if words[-2] in _TENS and last < 10:
        return _ORDINALS[words[-1]] + _TENS[words[-2]] if len(words) == 2 else None
    return None


def _is_open(word: str) -> bool:
    return word.isalpha() and word not in _CLOSED and word not in NUMBER_WORDS and word not in _ORDINALS


def counted(words: Sequence[str], single: bool) -> str | None:
    """What a phrase behind a number counts, `red apples`: its words; None where it is no such phrase.

    Args:
      words: in lower case, `7` not among them.
      single: whether one may be counted, or a part of one: `1/2 pizza`, `per person`.
    """
    for end in range(len(words), 0, -1):
        *before, noun = words[:end]
        plural = noun in _IRREGULAR or len(noun) > 2 and noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
        named = noun == "times" or _is_open(noun) and (plural or single and noun in _SINGULAR)
        named = named or noun == "pairs" and len(before) > 0
        if named and all(_is_open(word) or word in _BEFORE_NOUNS for word in before) and is_tail(words[end:]):
            return " ".join(words)
    return None


def is_tail(words: Sequence[str]) -> bool:
    """Whether words behind a unit or a noun add nothing to it: `of water`, `old`, `in total`."""
    tail = list(words)
    if tail and tail[0] in _BEHIND_NOUNS:
        tail = tail[1:]
    if not _TAIL.fullmatch("".join(f" {word}" for word in tail)):
        return False
    return all(
        _is_open(word)
        for word in tail
        if word not in ("of", "from", "in", "the", "a", "an", "his", "her", "their", "all")
    )


# What a sentence around an answer may say before it and behind it.
REMARKS = {("correct",), ("exact",), ("exactly",), ("final", "answer")}
DENIALS = {
    "not", "no", "wrong", "incorrect", "false", "never", "cannot", "without", "except", "isn't", "doesn't", "neither",
    "nor", "unless", "least", "most", "than", "under", "over", "below", "above", "if", "between", "nearly", "almost",
    "half", "twice", "double",
}  # fmt: skip

_SAME = [
    {"no solution", "no solutions", "no real solution", "no real solutions", "no solution exists", "empty set",
     "no solutions exist", "there is no solution", "there are no solutions", "no such solution exists", r"\emptyset"},
    {"not possible", "impossible", "it is impossible", "is impossible", "it is not possible"},
    {"does not exist", "dne", "doesn't exist", "no limit"},
    {"infinity", "infinitely many", "infinite", "infinitely many solutions", r"\infty"},
    {"all real numbers", "all reals", "real numbers", "all real", r"\mathbb { r }"},
    {"all integers", "integers", r"\mathbb { z }"},
]  # fmt: skip
_CANONICAL = {phrase: min(phrases, key=lambda text: (text[0] != "\\", text)) for phrases in _SAME for phrase in phrases}
_CASELESS = {"no", "yes", "true", "false", "even", "odd", "none", "both"}
KNOWN = (
    NUMBER_WORDS
    | set(OPERATIONS)
    | _CASELESS
    | APPROXIMATE
    | set("and or is are the not answer for all every where with cm mm km kg mg mph kph USD EUR GBP".split())
)


def statement(words: Sequence[str]) -> tuple[str, ...]:
    """A statement's words, so that two that say the same are equal as `same_words` has it."""
    plain = [part for word in words for part in (["is", "not"] if word.casefold() == "isn't" else [word])]
    plain = [word for word in plain if word.casefold() not in ("a", "an", "the") or len(plain) == 1]
    if len(plain) > 1 and len(plain[-1]) == 1 and plain[-2] in ("integers", "numbers", "primes", "reals"):
        plain = plain[:-1]  # `all positive integers n`
    canonical = _CANONICAL.get(" ".join(plain).casefold())
    return (canonical,) if canonical else tuple(plain)


def same_words(expected: Sequence[str], got: Sequence[str]) -> bool:
    """Whether two statements are word for word one, whatever their case: `Odd` and `odd`, but not `CO` and `Co`."""
    return len(expected) == len(got) and all(map(_same_word, expected, got))


def _same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    if a.casefold() != b.casefold():
        return False
    plain = all(word.islower() or word.isupper() or word.istitle() for word in (a, b))
    return plain and (len(a) > 2 or a.casefold() in _CASELESS)
