"""English around numbers: things that are counted, operations in words, and statements that are one statement."""

from __future__ import annotations

import re
from collections.abc import Sequence

from exprl_jax.reward.verifiers.math_answers import number_words

# Operations in words, by their signs.
OPERATIONS = {
    "plus": "+",
    "minus": "-",
    "negative": "-",
    "times": "*",
    "over": "/",
    "per": "/",
    "squared": "^2",
    "cubed": "^3",
    "factorial": "!",
    "percent": "%",
    "choose": "choose",
}
APPROXIMATE = {"about", "approximately", "roughly", "around", "approx"}

# No counted thing is called by these: the closed classes of English, what says something about a number, and verbs.
_CLOSED = set(
    """
    an the this that these those some any all every each no none neither either both not never nor and or but if
    unless when while where whether because since so than then as is are was were be been being has have had do does
    did can could may might must shall should will would cannot isn wasn of in on at to from by for with without
    within into onto upon over under above below between among about around after before against across through
    during until except besides beyond near off out up down per via plus minus times you he she it we they me him
    her us them my your his its our their who whom whose which what there here how why more most less least fewer
    fewest few many much several other others another such same only just even also too very quite rather almost
    nearly roughly approximately exactly possibly perhaps maybe probably always sometimes otherwise instead mod modulo
    base versus vs yes now ago hence thus therefore yet still again once twice thrice whereas themselves ourselves
    afterwards backwards forwards upwards downwards inwards outwards onwards towards anyways
    negative positive wrong incorrect false true correct right invalid impossible undefined unknown missing short
    squared cubed factorial choose percent percentage percentages percents root log sine cosine inverse reciprocal
    negatives inverses reciprocals opposites opposite powers power roots degrees halved doubled tripled divided
    multiplied increased decreased reduced rounded factorials logarithms exponentials quotients complements
    decrease loss drop reduction decline deficit debt owed discount decreases losses drops reductions deficits debts
    equals exceeds divides fails misses loses lacks contradicts holds works gives yields means seems appears becomes
    remains stays makes needs wants says satisfies violates differs results wins lies goes comes starts ends exists
    likes minuses pluses twos threes fours fives sixes sevens eights nines tens ones zeros doubles tenfold
    """.split()
)
# Nouns that are plural without an s, or not counted.
_PLURAL_WITHOUT_S = set(
    """
    people children men women mice geese teeth sheep fish deer dice oxen cattle data vertices matrices indices radii
    foci fungi cacti criteria phenomena bacteria folk feet staff water milk money rice flour sugar work sleep homework
    feed increase profit change gain interest fruit bread paper sand soil paint times
    """.split()
)
# Things that are counted in ones and in parts: `1 apple`, `1/2 pizza`.
_SINGULAR = set(
    """
    apple orange egg cookie cake pie pizza slice piece person child boy girl man woman student teacher friend book
    page pencil pen ball card coin ticket car bus dog cat bird tree flower box bag bottle can jar room house table
    chair way solution value point triangle square circle line side edge vertex face game team player match trip lap
    item toy shirt marble candy sandwich job task word letter digit
    """.split()
)
_BEFORE_NOUNS = {"more", "other", "different", "distinct", "additional", "extra", "possible"}
_BEHIND_NOUNS = set("each old long tall wide high deep away left total altogether apart remaining thick more".split())
BEHIND_NUMBERS = {"each", "left", "total", "altogether", "remaining", "in"}
_ARTICLES = {"the", "a", "an", "his", "her", "their"}
_TAIL = re.compile(
    r"(?: of(?: (?:the|a|an|his|her|their))?(?: \w+){1,3}| from \w+| in (?:total|all|length|height|width|area))?"
)

# What may stand in brackets behind an answer.
REMARKS = {("correct",), ("exact",), ("exactly",), ("final", "answer")}
# What no name of a value has in it: `not`, `at least`, `between`.
DENIALS = (
    set(
        """
    not no wrong incorrect false never cannot without except isn't doesn't neither nor unless least most than under
    over below above if between nearly almost half twice double triple opposite negative negation inverse reciprocal
    complement minus square squared cube cubed root
    """.split()
    )
    | APPROXIMATE
)
# What stands for phrases that all say it.
_SAYS = {
    r"\emptyset": "no solution|no solutions|no real solution|no real solutions|no solution exists|no solutions exist"
    "|there is no solution|there are no solutions|empty set",
    r"\infty": "infinity|infinitely many|infinite|infinitely many solutions",
    r"\mathbb R": "all real numbers|all reals|real numbers",
    r"\mathbb Z": "all integers|integers",
    "not possible": "impossible|it is impossible|is impossible|it is not possible",
    "does not exist": "dne|doesn't exist",
}
_STANDS_FOR = {phrase: meaning for meaning, phrases in _SAYS.items() for phrase in (meaning, *phrases.split("|"))}
# Short words whose case does not matter.
_CASELESS = {"no", "yes"}
# Words that are words without `\text`, however short.
KNOWN = (
    number_words.WORDS
    | set(OPERATIONS)
    | APPROXIMATE
    | _CASELESS
    | set("true false even odd none both and or is are the not answer for all every where with".split())
    | set("cm mm km kg mph kph usd eur gbp".split())
)


def _is_open(word: str) -> bool:
    return word.isalpha() and word not in _CLOSED and word not in number_words.WORDS


def counted(words: Sequence[str], single: bool) -> str | None:
    """What a phrase behind a number counts, `red apples in total`: the phrase; None where it counts nothing.

    Args:
      words: in lower case.
      single: whether one may be counted, or a part of one: `1/2 pizza`, `per person`.
    """
    for end in range(len(words), 0, -1):
        *before, noun = words[:end]
        plural = noun in _PLURAL_WITHOUT_S or len(noun) > 2 and noun.endswith("s") and noun[-2] not in "sui"
        named = noun == "times" or _is_open(noun) and (plural or single and noun in _SINGULAR)
        named = named or noun == "pairs" and before[-1:] in (["ordered"], ["unordered"], ["distinct"])
        named = named and not (noun == "times" and words[end:])  # `2 times more` are three
        if named and all(_is_open(word) or word in _BEFORE_NOUNS for word in before) and adds_nothing(words[end:]):
            return " ".join(words)
    return None


def adds_nothing(words: Sequence[str]) -> bool:
    """Whether words behind a unit or a noun leave its meaning: `of water`, `old`, `in total`, `from home`."""
    tail = words[bool(words) and words[0] in _BEHIND_NOUNS :]
    if not _TAIL.fullmatch("".join(f" {word}" for word in tail)):
        return False
    return all(_is_open(word) for word in tail[1:] if word not in _ARTICLES and word != "all")


def statement(words: Sequence[str]) -> tuple[str, ...]:
    """A statement's words without articles, and in one form where several say the same: `(r"\\emptyset",)`."""
    plain = [part for word in words for part in (("is", "not") if word.casefold() == "isn't" else (word,))]
    plain = [
        word
        for word, then in zip(plain, [*plain[1:], ""], strict=True)
        if word.casefold() not in ("a", "an", "the") or len(plain) == 1 or len(word) == 1 and not then.isalpha()
    ]
    if (
        len(plain) > 1
        and plain[-2] in ("integers", "numbers", "primes", "reals")
        and re.fullmatch("[A-Za-z]", plain[-1])
    ):
        plain = plain[:-1]  # `all positive integers n`
    stands_for = _STANDS_FOR.get(" ".join(plain).casefold())
    return (stands_for,) if stands_for else tuple(plain)


def same_words(expected: Sequence[str], got: Sequence[str]) -> bool:
    """Whether two statements are word for word one, whatever their case: `Odd` and `odd`, but not `CO` and `Co`."""
    return len(expected) == len(got) and all(map(_same_word, expected, got))


def _same_word(a: str, b: str) -> bool:
    if a == b or a.casefold() != b.casefold():
        return a == b
    # NaCl is spelled by its case, and AaBb.
    plain = all(word.islower() or word.isupper() or word.istitle() for word in (a, b))
    return plain and (len(a) > 2 or a.casefold() in _CASELESS)
