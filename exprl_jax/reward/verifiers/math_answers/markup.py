"""The names of LaTeX and Markdown: what is dropped because it changes nothing but looks, and what is one thing."""

from __future__ import annotations

import re
import unicodedata

# Done before anything is read, in this order: `pattern -> text`.
_REWRITES = [
    (re.compile(pattern, re.DOTALL), by)
    for pattern, by in [
        # Dress.
        (
            r"\\left\s*\\(?:\{|lbrace)\s*\\begin\s*\{(array|aligned|matrix)\}\s*(?:\{[lcr\s]*\})?"
            r"((?:(?!\\begin).)*?)\\end\s*\{\1\}\s*\\right\s*\.",
            r"\\begin{cases}\2\\end{cases}",
        ),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"^\s*(\*{1,3}|_{1,2}|`)(?=\S)(.*\S)\1\s*$", r"\2"),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:hspace|vspace|label|tag|color|[hv]?phantom)\*?\s*\{[^{}]*\}", " "),
        (r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}|\\bbox\s*\[[^\[\]]*\]", ""),
        (r"<(b|i|u|em|strong|span)>(.*?)</\1>", r" \2 "),
        (r"^\s*(['\"])([^'\"]*)\1\s*$", r"\2"),
        (r"\\therefore(?![A-Za-z])", r" \\text{so} "),
        (r"\{\s*\}\s*(?=[\^_])", ""),
        # Degrees, primes and times of day.
        (r"℃", r"°\\text{C}"),
        (r"℉", r"°\\text{F}"),
        (r"\\(?:circ|degree)(?![A-Za-z])|°", r"\\circ "),
        (r"(?<!\^)(?<!\^\{)(?<!\^ )\\circ ", r"^\\circ "),
        (r"(?<=[0-9])\s*\^\s*\{?\s*[oO]\s*\}?(?![A-Za-z])", r"^\\circ "),
        (r"\^\s*\{?\s*\\prime\s*\}?|′|’", "'"),
        (r"″|''", "''"),
        (r"(?i)\b([ap])\.\s?m\b\.?", r"\1m"),
        # Signs as they are typed.
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"(?<![A-Za-z\\])C_\{?(\w+)\}?\^\{?(\w+)\}?", r"\\binom{\1}{\2}"),
        (r"(?<![\w)}\]])[\^_]\{?(\w+)\}?\s*C_(?:\{(\w+)\}|(\w))", r"\\binom{\1}{\2\3}"),
        (r"(?<![A-Za-z\\])C\((\d+|n),\s*(\d+|[kmr])\)", r"\\binom{\1}{\2}"),
        # Powers of ten, bases and formulas as programs and chemists write them.
        (r"(?<=\d)\s*\\(?:text|mathrm|textrm)\s*\{\s*[eE]\s*([-+]?)\s*\}\s*\{?\s*([-+]?\d+)\s*\}?", r"e\1\2"),
        (r"(?<=\\ce\{)([A-Za-z\d()]+)\^(\d*[-+])(?=\})", r"\1^{\2}"),
        (r"\\num\s*\{([^{}]*)\}", r"\1"),
        (r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}\\]*)\}", r"\1\\text{ \2}"),
        (r"(?<![A-Za-z])(?:m\s*|\\(?:measured|spherical))\\?angle(?![A-Za-z])", r"\\angle"),
        (r"\\(?:[lc]?dots|dots[cb])(?![A-Za-z])|\.\.\.", "…"),
    ]
]
_SIGNS = {
    sign: text
    for line in r"""
    − -; – -; × \times; · \cdot; ⋅ \cdot; ÷ \div; ± \pm; ∓ \mp; ≤ \le; ≥ \ge; ≠ \ne; ≈ \approx; ∞ \infty; ∈ \in
    ∪ \cup; ∩ \cap; ∅ \emptyset; √ \sqrt; ∠ \angle; ∀ \forall; π \pi; θ \theta; μ \mu; µ \mu; Ω \Omega
    ⁄ /; ℝ \mathbb{R}; ℤ \mathbb{Z}; ℕ \mathbb{N}; ℚ \mathbb{Q}
    """.strip().splitlines()
    for sign, _, text in (entry.strip().partition(" ") for entry in line.split(";"))
} | dict.fromkeys("“”\u200b\u200c\u200d\u2060\ufeff", "")
for _sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
    _SIGNS[_sign] = "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", _sign).split("⁄"))
_FULL_WIDTH = {0xFF00 + at: 0x20 + at for at in range(1, 0x5F)}
# Elements with how many there are of them: `H2O`, alone or in `\\ce`.
_ELEMENTS = r"(?:(?:[A-Z][a-z]?|\([A-Za-z\d]+\))\d*)+"
_FORMULA = re.compile(
    r"^\s*(?:\\(?:text|mathrm|ce)\s*\{\s*)?"
    rf"(?=[^_]*[A-Z][a-z]?\d)(?=[A-Za-z\d]*[A-Z][^A-Z_]*[A-Z]){_ELEMENTS}(?![\w_^])|(?<=\\ce\{{){_ELEMENTS}"
)
# Digits that are raised or lowered, and what they are on the line.
_RAISED = {"^": ("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"), "_": ("₀₁₂₃₄₅₆₇₈₉", "0123456789")}
# Commands that are one thing under several names: `name: others`.
_ONE_THING = r"""
\frac: \dfrac \tfrac \cfrac \nicefrac \sfrac
\binom: \dbinom \tbinom
\le: \leq \leqslant
\ge: \geq \geqslant
\ne: \neq
\emptyset: \varnothing
\epsilon: \varepsilon
\phi: \varphi
\cdot: \ast
\approx: \sim \simeq
\setminus: \smallsetminus \backslash
\overline: \bar
\vec: \overrightarrow
\hat: \widehat
\Omega: \textohm
\log: \lg
\{: \lbrace
\}: \rbrace
(: \langle \lparen
): \rangle \rparen
[: \lbrack
]: \rbrack
|: \lvert \rvert \vert \mid
:: \colon
<: \lt
>: \gt
$: \$ \textdollar
€: \euro \texteuro
£: \pounds \textsterling
%: \%
or: \lor \vee
and: \land \wedge \&
"""
ALIASES = {
    other: name
    for name, others in (line.split(": ", 1) for line in _ONE_THING.strip().splitlines())
    for other in others.split()
}
# Commands whose argument is set as words, and those whose argument is set as it would be without them.
AS_WORDS = set(
    r"""
    \text \textbf \textit \textrm \textsf \texttt \textsc \textnormal \textup \emph \mbox \hbox \mathrm \operatorname
    \rm \ce
    """.split()
)
AS_IS = set(
    r"""
    \boldsymbol \bm \pmb \mathbf \mathit \mathsf \mathtt \underline \uline \ensuremath \mathop \boxed \fbox \bf \it \sf
    \tt \smash \mathord \mathbin \mathrel \mathopen \mathclose \mathpunct \mathinner
    """.split()
)
SILENT = set(
    r"""
    \displaystyle \textstyle \scriptstyle \limits \nolimits \mathstrut \strut \large \Large \LARGE \huge \small
    \normalsize \bfseries \itshape \rmfamily \centering \noindent
    """.split()
)
LETTERS = set(
    r"""
    \alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \rho \sigma \tau \upsilon
    \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Sigma \Phi \Psi \Omega \ell
    """.split()
)
# Environments that only lay out what they hold.
LAYOUTS = {"aligned", "align", "equation", "gathered", "split", "displaymath", "math", "center"}


def plain(text: str) -> str:
    """Text in one spelling of signs and without dress, but for the commands that tokens.py reads."""
    text = text.translate(_FULL_WIDTH)
    for command, (signs, plain_signs) in _RAISED.items():
        on_line = str.maketrans(signs, plain_signs)
        text = re.sub(
            f"[{signs}]+",
            lambda run, command=command, on_line=on_line: f"{command}{{{run[0].translate(on_line)}}}",
            text,
        )
    text = "".join(f"{_SIGNS[sign]} " if sign in _SIGNS else sign for sign in text)
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    text = _FORMULA.sub(lambda formula: re.sub(r"(?<=[A-Za-z)])(?=\d)", "_", formula[0]), text)
    # One dollar alone is money, two are a formula's.
    dollars = len(re.findall(r"(?<!\\)\$", text))
    return re.sub(r"(?<!\\)\$", r"\\$" if dollars == 1 else " ", text)
