r"""LaTeX, Markdown and plain text as one list of tokens.

`\textcolor{red}{18}`, `{\bf 18}`, `**18**` and `18~` are all the one token `18`.  Nothing that carries meaning is
dropped: an unknown command stays a token, which no other module understands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from exprl_jax.reward.verifiers.math_answers import markup, number_words, numerals, phrases

# Signs of an inequality.
ORDERS = {"<", ">", r"\le", r"\ge", r"\ne"}
_OPENERS = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil"}
_CLOSERS = {")", "]", "}", r"\}", r"\rfloor", r"\rceil"}


class Token(NamedTuple):
    r"""A piece of an answer.

    Attributes:
      kind: "number" (its plain form), "word" (letters), "command" (`\pi`), "mark" (one sign, `(`), "begin" or "end" (of
        an environment, its name).
      text: in one spelling: `\frac` for `\dfrac`.
      space: white space stands before it.
      roman: it is written as words or upright, and is no product of variables.
    """

    kind: str
    text: str
    space: bool = False
    roman: bool = False

    def is_word(self, *words: str) -> bool:
        """Whether it is one of some lower-case words."""
        return self.kind == "word" and self.roman and self.text.casefold() in words

    @property
    def depth(self) -> int:
        """How many brackets it opens, less those that it closes."""
        if self.kind in ("mark", "command"):
            return (self.text in _OPENERS) - (self.text in _CLOSERS)
        return (self.kind == "begin") - (self.kind == "end")


# Commands that are an answer without a number or a letter.
_ALONE = {r"\infty", r"\emptyset", r"\pi", r"\{"} | markup.LETTERS
_SPACE = re.compile(r"(?:\s|~|\\[ ,;:>]|\\(?:q?quad|(?:thin|med|thick)space|enspace|newline)(?![A-Za-z]))+|\\!")
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)\*?", re.DOTALL)
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([A-Za-z]+)\*?\}(?:\s*\{[lcr|\s]*\})?")
_LETTERS = r"[A-Za-zÀ-ž]+"
_WORD = {False: re.compile(_LETTERS), True: re.compile(rf"{_LETTERS}(?:'[a-z]+)?")}


def ambiguous_commas(text: str) -> bool:
    """Whether `1,234` occurs: one number, or two."""
    return re.search(r"[0-9],[0-9]{2,3}", text) is not None


def ambiguous_letters(text: str) -> bool:
    """Whether `12cm` occurs: a measure, or a product of variables."""
    return re.search(r"[0-9](?:\s|~|\\[,;: ])*(?:\\mu\s*|[µμ])?[A-Za-z]", text) is not None


class Unreadable(ValueError):
    """Text that is no answer of any kind: nothing, or half of something."""


def tokenize(text: str, commas: bool = True) -> list[Token]:
    """Reads an answer's text.

    Args:
      text: LaTeX, Markdown or plain text, without a box around it.
      commas: whether a comma groups digits, `1,234`, outside of brackets and where these have other separators.

    Raises:
      Unreadable: it is empty, or its brackets do not match.
    """
    tokens = stripped(_tokens(text, commas))
    if not any(token.kind in ("number", "word") or token.text in _ALONE for token in tokens):
        raise Unreadable("no word and no number")
    # The French way to write open ends: `]0, 1[`.
    for index, bracket, other in ((0, "]", "("), (-1, "[", ")")):
        if tokens[index].text == bracket:
            tokens[index] = tokens[index]._replace(text=other)
    if sum(token.depth for token in tokens):
        raise Unreadable("a bracket without its other half")
    if any(a.text == "{" and b.text == "}" for a, b in zip(tokens, tokens[1:], strict=False)):
        raise Unreadable("an empty group")
    return tokens


def _tokens(text: str, commas: bool) -> list[Token]:
    text = markup.plain(text)
    tokens: list[Token] = []
    groups: list[tuple[bool, bool]] = []  # of each open brace: whether it is a token, whether its content is upright
    brackets: list[int] = []  # where the others that are open start
    at, space, opening = 0, False, None  # `opening`: whether the next group is upright, None if nothing says so
    while at < len(text):
        upright = bool(groups) and groups[-1][1]
        token, end, spaced = None, at + 1, space
        if match := _SPACE.match(text, at):
            end, spaced = match.end(), space or match[0] != r"\!"
        elif match := _ENVIRONMENT.match(text, at):
            end = match.end()
            token = None if match[2] in markup.LAYOUTS else Token(match[1], match[2], space)
        elif text[at] in "0123456789." and (
            match := numerals.pattern(commas and _groups_digits(text, brackets)).match(text, at)
        ):
            end, token = match.end(), Token("number", numerals.plain(match), space, upright)
        elif match := _COMMAND.match(text, at):
            end, name = match.end(), match[0].rstrip("*")
            if name in markup.AS_WORDS or name in markup.AS_IS:
                opening = upright or name in markup.AS_WORDS
            elif name not in markup.SILENT:
                token = _command(markup.ALIASES.get(name, name), space)
        elif match := _WORD[upright].match(text, at):
            end, token = match.end(), Token("word", match[0], space, upright or _is_text(match[0], space))
        elif text[at] == "{":
            groups.append((opening is None, upright if opening is None else opening))
            token, opening = Token("mark", "{", space) if groups[-1][0] else None, None
        elif text[at] == "}":
            if not groups:
                raise Unreadable("a brace closes that none has opened")
            token = Token("mark", "}") if groups.pop()[0] else None
            spaced = space or upright  # what stands behind a group of words is another word
        elif text[at] == "-" and tokens and tokens[-1].kind == "word" and (upright or _joins(tokens[-1], text, at)):
            spaced = True  # `twenty-one` is `twenty one`
        else:
            token = Token("mark", text[at], space, upright)
        if token:
            brackets = _brackets(brackets, token, at)
            tokens.append(token)
            spaced = False
        at, space = end, spaced
    if groups:
        raise Unreadable("a brace is open at the end")
    tokens = [
        _article(token, before, then) for before, token, then in zip([None, *tokens], tokens, tokens[1:] + [None])
    ]
    if any(token.kind == "begin" for token in tokens):
        return tokens
    return _on_one_line([token for token in tokens if token.text != "&"])


def _article(token: Token, before: Token | None, then: Token | None) -> Token:
    """An `a` before a number word is a word outside of `\\text` too: `three and a half`."""
    is_word = token.text in ("a", "an") and token.space and before is not None and before.roman and then is not None
    return token._replace(roman=True) if is_word and then.is_word(*number_words.WORDS) else token


def _on_one_line(tokens: list[Token]) -> list[Token]:
    """Lines one below another are a list, `x &= 1 \\\\ y &= 2`, or one chain that goes on, `\\\\ &= 3`."""
    line: list[Token] = []
    for at, token in enumerate(tokens):
        if token.text != r"\\":
            line.append(token)
        elif not (at + 1 < len(tokens) and tokens[at + 1].text in ORDERS | {"=", r"\approx", r"\equiv", ","}):
            line += [] if line and line[-1].text in (",", ";") else [token._replace(text=",")]
    return line


def _brackets(starts: list[int], token: Token, at: int) -> list[int]:
    """Where the brackets start that are open behind a token; braces of groups are none."""
    if token.text in ("{", "}") or not token.depth:
        return starts
    return [*starts, at] if token.depth > 0 else starts[:-1]


def _groups_digits(text: str, brackets: Sequence[int]) -> bool:
    """Whether a comma may group digits: in brackets, if others separate what they hold, `(1,000, 2,000)`."""
    if not brackets:
        return True
    inner = re.split(r"[)\]]|\\\}", text[brackets[-1] + 1 :], maxsplit=1)[0]
    return re.search(r",\s|;|,\\", inner) is not None


def _command(name: str, space: bool) -> Token:
    if name.isalpha():  # `\lor` is the word "or"
        return Token("word", name, True, True)
    return Token("command" if name[0] == "\\" and name[1:].isalpha() else "mark", name, space)


def _joins(word: Token, text: str, at: int) -> bool:
    r"""Whether a hyphen outside `\text` stands between two words, and is no minus between variables."""
    following = _WORD[False].match(text, at + 1)
    return word.roman and text[at - 1].isalpha() and following is not None and _is_text(following[0], False)


def _is_text(word: str, space: bool) -> bool:
    r"""Whether letters outside `\text` are a word, `million`, and not a product of variables, `abc`."""
    known = (word.casefold() if len(word) > 2 else word) in phrases.KNOWN
    return len(word) > 1 and (known or len(word) > 5 or space and len(word) > 3 and word[1:].islower())


# --- parts -----------------------------------------------------------------------------------------------------------


def stripped(tokens: Sequence[Token]) -> list[Token]:
    """Without the stop or comma at the end, and without braces around everything."""
    tokens = list(tokens)
    while tokens and tokens[-1].kind == "mark" and tokens[-1].text in (".", ",", ";"):
        tokens.pop()
    while len(tokens) > 1 and tokens[0].text == "{" and closing(tokens, 0) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def closing(tokens: Sequence[Token], start: int) -> int:
    """Where the bracket at `start` closes, by a bracket of any kind; the length if it does not."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += tokens[index].depth
        if not depth:
            return index
    return len(tokens)


def split(tokens: Sequence[Token], is_separator: Callable[[Token], bool]) -> tuple[list[list[Token]], list[Token]]:
    """The parts between separators outside of brackets, and the separators."""
    parts, separators, depth = [[]], [], 0
    for token in tokens:
        depth += token.depth
        if not depth and not token.depth and is_separator(token):
            parts.append([])
            separators.append(token)
        else:
            parts[-1].append(token)
    return parts, separators


def texts(tokens: Sequence[Token]) -> tuple[str, ...]:
    """The tokens' texts, without stops in words and braces around a single token: `x_{1}` is `x_1`."""
    short: list[str] = []
    for token in tokens:
        if not (token.kind == "mark" and token.roman and token.text in ".,"):
            short.append(token.text)
        if token.text == "}" and len(short) > 2 and short[-3] == "{":
            short[-3:] = [short[-2]]
    return tuple(short)
