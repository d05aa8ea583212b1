r"""What is said beside an answer of what its letters run over: `for all n`, `k\in\mathbb{Z}`, `where c is a constant`.

That says nothing new where the reference is silent about it.  Any other condition, `for all even n`, `if x > 0`, does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from exprl_jax.reward.verifiers.math_answers.tokens import ORDERS, Token, closing, stripped, texts

_STARTS = "for where with if when whenever provided unless given such except otherwise but".split()
_ADJECTIVE = r"(?:positive|nonnegative|natural|whole|real|rational|complex|arbitrary)"
_NOUN = r"(?:integer|number|real|rational|natural|constant)s?"
_DOMAIN = re.compile(
    rf"""
    [,(]?\s* (?:(?:for|where|with|\\forall)\s+)* (?:(?:any|all|every|each|an?|some(?=\s.*constant))\s+)*
    (?P<kind> (?:{_ADJECTIVE}\s)* (?:{_NOUN}\b)? )\s*
    (?P<letters> (?:\\[a-z]+ | [A-Za-z]) (?:\s,\s[A-Za-z])* )?
    (?:\s? (?:\\in | in | (?:is|are|be)(?:\s(?:any|an?))?) \s
        (?P<set> \\mathbb\s[A-Z](?:\s[\^_]\s(?:[+*]|\{{\s(?:[+*]|(?:>|\\ge)\s0)\s\}}))? | (?:{_ADJECTIVE}\s)*{_NOUN})
    )?\s*\)?
    """,
    re.VERBOSE,
)
# Sets by their singular names, with what they are called in LaTeX.
_SETS = {
    "": "",
    "number": "",
    "constant": "",
    "arbitrary constant": "",
    "real constant": "R",
    "integer": "Z",
    "positive integer": "N",
    "natural number": "N",
    "natural": "N",
    "whole number": "N0",
    "nonnegative integer": "N0",
    "rational number": "Q",
    "rational": "Q",
    "real number": "R",
    "real": "R",
    "positive real number": "R+",
    "positive real": "R+",
    "complex number": "C",
}

Domains = tuple[tuple[str, str], ...]


def without(tokens: list[Token]) -> tuple[list[Token], Domains, tuple[str, ...]]:
    """Takes conditions away.

    Returns:
      The answer; what its letters run over, by letter; and the tokens of a condition that says anything else.
    """
    if tokens[0].is_word("for") or tokens[0].text == r"\forall":  # `for all n, f(n) = n`
        commas = [index for index, token in enumerate(tokens) if token.text == ","]
        tokens = tokens[commas[-1] + 1 :] + tokens[: commas[-1]] if commas else tokens
    if tokens[0].is_word("all", "any", "every"):  # `all integers n >= 3`
        letter = next((at for at, token in enumerate(tokens) if not token.roman), len(tokens))
        kind = _set(" ".join(texts(tokens[1:letter])))
        if kind is not None and letter + 1 < len(tokens) and tokens[letter + 1].text in ORDERS:
            return tokens[letter:], ((tokens[letter].text, kind),), ()
    at = _start(tokens)
    if at is None:
        return tokens, (), ()
    head, tail = stripped(tokens[:at]), tokens[at:]
    domains = _bound(head, tail) or _domains(tail)
    if domains is None:
        domains = _some(head, tail)
    return (head, (), texts(tail)) if domains is None else (head, domains, ())


def _start(tokens: Sequence[Token]) -> int | None:
    """Where a condition starts, behind an answer."""
    depth = 0
    for index, token in enumerate(tokens):
        if index and not depth:
            opens = token.text == "(" and closing(tokens, index) == len(tokens) - 1
            if _opens(token) or opens and index + 1 < len(tokens) and _opens(tokens[index + 1]):
                return index
            member = [*tokens[index + 1 : index + 3]]
            if (opens or token.text in (",", ";")) and len(member) == 2:
                if member[1].text == r"\in" or _bound(tokens[:index], tokens[index:]):
                    return index
        depth += token.depth
    return None


def _opens(token: Token) -> bool:
    return token.is_word(*_STARTS) or token.text == r"\forall"


def _domains(tokens: Sequence[Token]) -> Domains | None:
    """What letters run over; None if that is not all that a condition says."""
    match = _DOMAIN.fullmatch(
        " ".join(texts([token for token in tokens if token.text != "-"])).replace("non negative", "nonnegative")
    )
    if not match:
        return None
    kinds = [_set(match[group]) for group in ("kind", "set") if match[group]]
    if None in kinds or not (kinds or match["letters"]):
        return None
    return tuple((letter, kind) for letter in (match["letters"] or "").split(" , ") for kind in kinds or [""])


def _bound(head: Sequence[Token], tail: Sequence[Token]) -> Domains | None:
    """Of `, n >= 1` behind `a_n = ...`, that n counts from there; None if that is not what is said."""
    bound = [token for token in tail if not _opens(token) and not token.is_word("all", "every", "any")]
    said = " ".join(texts([token for token in bound if token.text not in (",", "(", ")")]))
    match = re.fullmatch(r"([ijklmnKMN]) (\\ge [01]|> 0)", said)
    if not match or not re.match(rf"[A-Za-z]_{match[1]}(\(.*\))?=", "".join(texts(head))):
        return None
    return ((match[1], "N0" if match[2].endswith("ge 0") else "N"),)


def _some(head: Sequence[Token], tail: Sequence[Token]) -> Domains | None:
    """Of `n = 2^k for some integer k`, what k runs over; None where the letter is the answer's own."""
    plain = [token for token in tail if not token.is_word("some")]
    domains = _domains(plain) if len(plain) < len(tail) else None
    names = texts(head)[: texts(head).index("=")] if "=" in texts(head) else None
    return domains if domains and names and not {letter for letter, _ in domains} & set(names) else None


def _set(text: str) -> str | None:
    """The letter of a set that is spelled in words or LaTeX, with a plus for its positive numbers."""
    if text.startswith(r"\mathbb"):
        name = re.search("[A-Z]", text)[0] + "".join(re.findall(r"[+*>]|\\ge", text))
        return {"Z+": "N", "Z>": "N", "R>": "R+", r"Z\ge": "N0", r"N\ge": "N0"}.get(name, name)
    return _SETS.get(re.sub(r"s\b", "", text.strip()))
