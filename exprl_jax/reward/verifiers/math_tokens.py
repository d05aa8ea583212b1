r"""LaTeX, Markdown and plain text as one list of tokens; what only changes how a thing is set is dropped.

`\textcolor{red}{18}`, `{\bf 18}`, `**18**` and `18~` are all the one token `18`.  Nothing that carries meaning is
dropped: an unknown command stays a token, which no reader of math_expression.py or math_answer.py understands.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from exprl_jax.reward.verifiers import math_words


class Token(NamedTuple):
    r"""A piece of an answer.

    Attributes:
      kind: "number" (an unsigned decimal, `0.1(6)` where it repeats), "word" (letters), "command" (`\pi`), "mark" (one
        sign, `(`), "begin" or "end" (the name of an environment).
      text: as it is read: `1234.5` for `1{,}234.5`, `\frac` for `\dfrac`.
      space: white space stands before it.
      roman: it is written as words or as upright letters, not as a product of variables.
    """

    kind: str
    text: str
    space: bool = False
    roman: bool = False


# What is replaced before anything is read: `pattern -> text`.
_REWRITES = [
    (re.compile(pattern), by)
    for pattern, by in [
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"^\s*(\*{1,3}|_{1,2}|`)(?=\S)(.*\S)\1\s*$", r"\2"),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:phantom|hspace|vspace|label|tag|color)\*?\s*\{[^{}]*\}", " "),
        (r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}", ""),
        (r"\\(?:circ|degree)(?![A-Za-z])|°", r"\\circ "),
        (r"(?<!\^)(?<!\^\{)(?<!\^ )\\circ ", r"^\\circ "),
        (r"℃|℉", lambda match: r"^\circ\text{%s}" % ("C" if match[0] == "℃" else "F")),
        (r"(?<=[0-9])\s*\^\s*\{?\s*[oO]\s*\}?(?![A-Za-z])", r"^\\circ "),
        (r"\^\s*\{?\s*\\prime\s*\}?|′|’", "'"),
        (r"″|''", "''"),
        (r"(?i)\b([ap])\.\s?m\b\.?", r"\1m"),
        (r"(\d)\s*[xX]\s*10\s*\^", r"\1\\times 10^"),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"(?<![A-Za-z\\])C_\{?(\w+)\}?\^\{?(\w+)\}?", r"\\binom{\1}{\2}"),
        (r"\\(?:ldots|dots|cdots|dotsc)(?![A-Za-z])|\.\.\.|…", "…"),
    ]
]
# Signs outside ASCII, and commands that are one thing under several names.
_SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∈": r"\in ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "√": r"\sqrt ", "∠": r"\angle ", "∀": r"\forall ", "π": r"\pi ", "θ": r"\theta ",
    "μ": r"\mu ", "µ": r"\mu ", "Ω": r"\Omega ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "²": "^2", "³": "^3", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "“": "", "”": "",
}  # fmt: skip
_ALIASES = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom",
    r"\leq": r"\le", r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lt": "<",
    r"\gt": ">", r"\varnothing": r"\emptyset", r"\varepsilon": r"\epsilon", r"\varphi": r"\phi", r"\ast": r"\cdot",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\langle": "(", r"\rangle": ")", r"\lbrack": "[", r"\rbrack": "]",
    r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\colon": ":", r"\lor": "or", r"\land": "and",
    r"\vee": "or", r"\wedge": "and", r"\backslash": r"\setminus", r"\smallsetminus": r"\setminus", r"\simeq": r"\approx",
    r"\sim": r"\approx", r"\euro": "€", r"\texteuro": "€", r"\pounds": "£",
    r"\textdollar": "$", r"\$": "$", r"\%": "%", r"\&": "&", r"\#": "#", r"\lg": r"\log", r"\iff": r"\Leftrightarrow",
    r"\bmod": r"\mod", r"\pmod": r"\mod", r"\Reals": r"\R", r"\overrightarrow": r"\vec", r"\widehat": r"\hat",
    r"\bar": r"\overline", r"\textohm": r"\Omega",
}  # fmt: skip
_SET_UPRIGHT = (
    "text textbf textit textrm textsf texttt textsc textnormal textup emph mbox hbox mathrm operatorname rm".split()
)
_SET_OTHERWISE = (
    "boldsymbol bm pmb mathbf mathit mathsf mathtt underline uline ensuremath mathop boxed fbox bf it sf tt".split()
)
_NOTHING = (
    "displaystyle textstyle scriptstyle limits nolimits mathstrut strut large Large LARGE huge small normalsize "
    "bfseries itshape rmfamily centering color noindent"
).split()
_LAYOUT = {"aligned", "align", "equation", "gathered", "split", "displaymath", "math", "center"}

_SPACE = re.compile(r"(?:\s|~|\\[ ,;:>]|\\(?:q?quad|(?:thin|med|thick)space|enspace|newline)(?![A-Za-z]))+|\\!")
_GROUP = r"\{,\}|\\!,|,\\!|\\[,;:! ]|\\thinspace\s?|[ ~'_]"
_GROUPED = (
    r"[1-9][0-9]{0,2}(?P<by%s>%s)[0-9]{3}(?:(?P=by%s)[0-9]{3})*(?!(?P=by%s)?[0-9])(?P<part%s>\.[0-9]+)?(?!,[0-9])"
)
_NUMBERS = {
    grouping: re.compile(
        "|".join(
            [
                r"[1-9][0-9]{0,2}(?:\.[0-9]{3})+(?P<comma>(?:,|\{,\})[0-9]+)(?![0-9.])",
                r"(?P<points>[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,})(?![0-9.])",
                _GROUPED % (1, _GROUP + "|," * grouping, 1, 1, 1),
                *[r"(?P<lakhs>[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3})(?!,?[0-9])"] * grouping,
                r"(?P<decimal>[0-9]+\{,\}[0-9]+)(?!\{,\})",
                r"(?P<start>[0-9]*\.[0-9]*)(?:\\(?:overline|bar|dot)\s*(?:\{(?P<over>[0-9]+)\}|(?P<one>[0-9]))"
                r"(?P<last>[0-9]*\\dot\s*\{?[0-9]\}?)?|\((?P<paren>[0-9]+)\))",
                r"(?P<before>[0-9]*\.[0-9]*?)(?:(?P<short>[0-9]{1,2}?)(?P=short){2,}|(?P<long>[0-9]{3,9}?)(?P=long)+)\s*…",
                r"(?P<plain>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<power>[-+]?[0-9]+)(?![0-9A-Za-z]))?",
            ]
        )
    )
    for grouping in (False, True)
}
_COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)\*?", re.DOTALL)
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([A-Za-z]+)\*?\}(?:\s*\{[lcr|\s]*\})?")
_UPRIGHT_WORD = re.compile(r"[A-Za-zÀ-ž]+(?:'[a-z]+)?")
_WORD = re.compile(r"[A-Za-zÀ-ž]+")


def ambiguous_commas(text: str) -> bool:
    """Whether `1,234` occurs: one number, or two."""
    return re.search(r"[0-9],[0-9]{2,3}", text) is not None


def tokenize(text: str, grouping: bool = True) -> list[Token]:
    """Reads an answer's text.

    Args:
      text: LaTeX, Markdown or plain text, without a box around it.
      grouping: whether a comma before three digits groups them, `1,234`; it separates two numbers otherwise.

    Raises:
      ValueError: the braces do not match.
    """
    text = _rewritten(text)
    tokens: list[Token] = []
    brackets: list[int] = []
    groups: list[tuple[bool, bool]] = []  # of each open brace: whether it is a token, whether its content is upright
    at, space, upright_next = 0, False, None
    while at < len(text):
        upright = bool(groups) and groups[-1][1]
        rest = None
        if rest := _SPACE.match(text, at):
            space = space or rest[0] != r"\!"
        elif rest := _ENVIRONMENT.match(text, at):
            if rest[2] not in _LAYOUT:
                tokens.append(Token(rest[1], rest[2], space))
                space = False
        elif rest := _NUMBERS[grouping and (not brackets or _separates(text, brackets[-1]))].match(text, at):
            tokens.append(Token("number", _plain_number(rest), space, upright))
            space = False
        elif rest := _COMMAND.match(text, at):
            name = rest[0].rstrip("*")
            if name[1:] in _SET_UPRIGHT:
                upright_next = True
            elif name[1:] in _SET_OTHERWISE:
                upright_next = upright
            elif name[1:] not in _NOTHING:
                if name == r"\{":
                    brackets.append(at)
                elif name == r"\}" and brackets:
                    brackets.pop()
                tokens.append(_of_command(_ALIASES.get(name, name), space))
                space = False
        elif rest := (_UPRIGHT_WORD if upright else _WORD).match(text, at):
            tokens.append(Token("word", rest[0], space, upright or _reads_as_text(rest[0], space)))
            space = False
        elif text[at] == "{":
            groups.append((upright_next is None, upright if upright_next is None else upright_next))
            if groups[-1][0]:
                tokens.append(Token("mark", "{", space))
                space = False
            upright_next = None
        elif text[at] == "}":
            if not groups:
                raise ValueError("a brace closes that none has opened")
            if groups.pop()[0]:
                tokens.append(Token("mark", "}", False))
            # What stands behind a group of words is another word.
            space = space or upright
        else:
            if text[at] in "([":
                brackets.append(at)
            elif text[at] in ")]" and brackets:
                brackets.pop()
            joined = text[at] == "-" and upright and tokens and tokens[-1].kind == "word"
            if not joined:
                tokens.append(Token("mark", text[at], space, upright))
            space = joined
        at = rest.end() if rest else at + 1
    if groups:
        raise ValueError("a brace is open at the end")
    return tokens


def _rewritten(text: str) -> str:
    text = "".join(_SIGNS.get(sign, sign) for sign in text)
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    dollars = len(re.findall(r"(?<!\\)\$", text))
    return re.sub(r"(?<!\\)\$", r"\\$" if dollars == 1 else " ", text)


def _separates(text: str, start: int) -> bool:
    """Whether a bracket separates its numbers by more than a comma, `(1,000, 2,000)`, so that a comma may group."""
    end = re.search(r"[)\]]|\\\}|$", text[start + 1 :])
    return re.search(r",\s|;|,\\", text[start : start + 1 + end.start()]) is not None


def _of_command(name: str, space: bool) -> Token:
    kind = "command" if name[0] == "\\" and name[1:].isalpha() else "word" if name.isalpha() else "mark"
    return Token(kind, name, space or kind == "word", kind == "word")


def _plain_number(match: re.Match[str]) -> str:
    r"""A number without separators, `1234.5`; `0.1(6)` where its end repeats; `15(e2)` of a power of ten."""
    part = match.groupdict()
    if part["comma"]:
        whole = match[0].removesuffix(part["comma"]).replace(".", "")
        return whole + "." + part["comma"].lstrip("{,}")
    if part["decimal"]:
        return match[0].replace("{,}", ".")
    if part["start"] is not None:
        return f"{part['start']}({part['over'] or part['paren'] or part['one']}{''.join(re.findall('[0-9]', part['last'] or ''))})"
    if part["before"] is not None:
        return f"{part['before']}({part['short'] or part['long']})"
    if part["plain"]:
        return part["plain"] + (f"e{part['power']}" if part["power"] else "")
    digits, point, decimals = match[0].partition(".") if not part["points"] else (match[0], "", "")
    return re.sub(r"[^0-9]", "", digits) + point + decimals


def _reads_as_text(word: str, space: bool) -> bool:
    """Whether letters outside `\text` are a word, `million`, and not a product of variables, `abc`."""
    lower = word.casefold()
    return len(word) > 1 and (
        (lower if len(word) > 2 else word) in math_words.KNOWN
        or len(word) > 5
        or space
        and len(word) > 3
        and word[1:].islower()
    )
