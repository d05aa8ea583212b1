r"""What a statement about answer choices says: which options it calls the answer, and which it says are not.

Options that a statement names, by label, by whole text, or by both, become marks; the rest is read clause by clause:

    B is wrong, so (A) the nucleus    →    ⟦1⟧ is wrong, so ⟦0⟧    →    names A, denies B

Whatever is not understood names nothing.  A statement that is unsure (`B or C`, `B?`, `B, if the cell is dead`) is
unclear, and so names nothing however much of it is understood.  Of a reason (`because ...`) nothing is read.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

Choices = tuple[tuple[str, str], ...]


class Statement(NamedTuple):
    """What a statement says.

    Attributes:
      named: labels of the options that it calls the answer.
      denied: labels of the options that it says are not.
      mentioned: labels of all options that it names.
      unclear: it is a question, a condition, or unsure.
      judges: it says of an option that it is, or is not, correct.
    """

    named: frozenset[str] = frozenset()
    denied: frozenset[str] = frozenset()
    mentioned: frozenset[str] = frozenset()
    unclear: bool = False
    judges: bool = False


# --- dress: LaTeX, Markdown and HTML that only change how a text looks -----------------------------------------------

_DRESS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|sc|up|normal)?|math(?:rm|bf|sf|it|tt|cal|bb|frak)|boldsymbol|bm|pmb|mbox|hbox|emph"
    r"|underline|uline|fbox|framebox|ensuremath|operatorname|(?:textcolor|colorbox|color)\s*\{[^{}]*\})\s*\{([^{}]*)\}"
)
HTML_TAG = r"</?(?:b|i|u|em|strong|code|span|p|br|mark)(?: [^<>]{0,99})?/?>"
_SILENT = re.compile(
    rf"\\[()\[\]]|\*\*|[$`]|{HTML_TAG}"
    r"|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|bf|rm|it|sf|tt|bfseries|itshape|tiny|small|normalsize|large"
    r"|Large|LARGE|huge|Huge)(?![A-Za-z])|\\color\{[^{}]*\}"
)
_FULL_WIDTH = {0xFF00 + at: 0x20 + at for at in range(1, 0x5F)}
_STRUCK = re.compile(r"~~[^~\n]{1,99}~~")
_YES_NO = ((re.compile("[✓✔✅☑]️?"), " "), (re.compile("[✗✘❌☒🚫]️?"), " is wrong "))
_SPACE = re.compile(r"\\(?:[,;:! ]|q?quad(?![A-Za-z]))|[~\s]+")
_QUOTED = re.compile("[\"'“‘«](.*)[\"'”’»]")
_SYMBOL = re.compile(r"\\[A-Za-z]+|\\%|[µ−–]")
_SYMBOLS = {
    r"\times": "×",
    r"\cdot": "·",
    r"\circ": "°",
    r"\degree": "°",
    r"\pm": "±",
    r"\infty": "∞",
    r"\to": "→",
    r"\rightarrow": "→",
    r"\leq": "≤",
    r"\le": "≤",
    r"\geq": "≥",
    r"\ge": "≥",
    r"\neq": "≠",
    r"\ne": "≠",
    r"\approx": "≈",
    r"\alpha": "α",
    r"\beta": "β",
    r"\gamma": "γ",
    r"\delta": "δ",
    r"\Delta": "Δ",
    r"\lambda": "λ",
    r"\mu": "μ",
    r"\nu": "ν",
    r"\pi": "π",
    r"\sigma": "σ",
    r"\theta": "θ",
    r"\omega": "ω",
    r"\Omega": "Ω",
    r"\%": "%",
    "µ": "μ",
    "−": "-",
    "–": "-",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
}
_FRACTION = re.compile(r"\\frac\{(\w+)\}\{(\w+)\}")
_DEGREE = re.compile(r"\^(?:\{°\}|°)")
# A key has no spaces.
_ARTICLE = re.compile(r"^the(?=[a-z]{3})")
_POWER = re.compile(r"\^(-?\d+|[A-Za-z])")


def bare(text: str) -> str:
    r"""Text without what only changes its look, `\underline{...}`, dollars, stars and tags, and with single spaces.

    Struck text is gone, and a check mark or a cross says what it says.
    """
    text = _SILENT.sub("", _STRUCK.sub("", text))
    if not text.isascii():
        text = text.translate(_FULL_WIDTH)
        for mark, words in _YES_NO:
            text = mark.sub(words, text)
    dressed = None
    while text != dressed and "\\" in text:
        dressed, text = text, _DRESS.sub(r"\1", text)
    text = _SPACE.sub(" ", text).strip()
    quoted = _QUOTED.fullmatch(text)
    return quoted[1].strip() if quoted else text


def _key(text: str) -> str:
    """What two spellings of one option have in common; of a bare text."""
    key = _SYMBOL.sub(lambda symbol: _SYMBOLS.get(symbol[0], symbol[0]), text)
    key = _FRACTION.sub(r"\1/\2", _DEGREE.sub("°", "".join(key.split())))
    return _POWER.sub(r"^{\1}", key).rstrip(".") or key


# --- options that are named by themselves ----------------------------------------------------------------------------

# Characters by which the name of an option may be longer than its text.
_DRESS_LENGTH = 200
_LEAD = r"(?:the )?(?:(?:final|correct) )?(?:(?:answer|option|choice|letter)\b[ :]*(?:is\b)?[ :]*){0,2}"
_LABEL = re.compile(rf"(?i:{_LEAD})[(\[{{<*_\"]* ?([A-Za-z0-9]{{1,3}}) ?[)\]}}>*_\".,:;!]*")
_LABEL_FIRST = re.compile(rf"(?i:{_LEAD})[(\[{{]?([A-Za-z0-9]{{1,3}})(?:[)\]}}][.:,]?|[.:]| [-–—])(?: |$)")

_PARENTHESES = re.compile(r"([^()]+) \((.+)\)\.?")


def one_option(text: str, choices: Choices) -> set[str]:
    """The labels of the options that a text is nothing else than the name of: text, label, or a label and a text.

    Several where two options have the text, or label and text are of two options.
    """
    plain = bare(text)
    named = _one(text.strip(), choices) or _one(plain, choices)
    if not named and (pair := _PARENTHESES.fullmatch(plain)):
        label, option = _one(pair[1], choices), _one(pair[2], choices)
        named = label | option if label and option else set()
    return named


def one_label(text: str, choices: Choices) -> set[str]:
    """The label that a text is nothing else than; empty if it is none."""
    return _label(bare(text), choices)


def _one(plain: str, choices: Choices) -> set[str]:
    options, folded = _options(choices)
    key = _key(plain)
    folded_key = _ARTICLE.sub("", key.casefold())
    named = options.get(plain) or options.get(key) or _label(plain, choices, fold=False)
    named = named or folded.get(folded_key) or _label(plain, choices)
    if not named and (first := _labelled(plain, choices)):
        rest = plain[_LABEL_FIRST.match(plain).end() :].strip()
        second = options.get(rest) or options.get(_key(rest)) or folded.get(_ARTICLE.sub("", _key(rest).casefold()))
        second = second or _label(rest, choices, fold=False) or _labelled(rest, choices)
        if second:
            # Of two options with one text, a label names one.
            named = first if first <= second else first | second
    return set(named or ())


def _label(plain: str, choices: Choices, fold: bool = True) -> set[str]:
    whole = _LABEL.fullmatch(plain)
    return _labels_of(whole[1], choices, fold) if whole else set()


def _labelled(plain: str, choices: Choices) -> set[str]:
    """The label in front of an expression."""
    first = _LABEL_FIRST.match(plain)
    return _labels_of(first[1], choices, True) if first else set()


def _labels_of(name: str, choices: Choices, fold: bool) -> set[str]:
    exact = {label for label, _ in choices if label == name}
    return exact or {label for label, _ in choices if fold and label.casefold() == name.casefold()}


@functools.lru_cache(maxsize=1024)
def _options(choices: Choices) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The labels of the options with a text, by the text and its key, and by its key in lower case without article."""
    exact: dict[str, set[str]] = {}
    folded: dict[str, set[str]] = {}
    for label, text in choices:
        for name in {text.strip(), _key(bare(text))}:
            exact.setdefault(name, set()).add(label)
        folded.setdefault(_ARTICLE.sub("", _key(bare(text)).casefold()), set()).add(label)
    return exact, folded


# --- clauses ---------------------------------------------------------------------------------------------------------

_X = r"⟦\d+⟧"
_PAIR = rf"(?:either |both )?{_X}(?: (?:and|or|nor|&) (?:also )?(?:the )?{_X})?"
_LIST = rf"(?:both |either |all of )?{_X}(?:(?:,? ?(?:and|or|nor|&|/|\+) ?(?:also )?|, ?| )(?:the )?{_X})*"
# `B, and C is wrong` is about C, `B and C are wrong` about both.
_ONE, _MANY = r"(?:is|was|looks|seems|has to be|'s)", r"(?:are|were|look|seem|have to be)"
_ANY = r"(?:must be|should be|can be|would be|will be)"
_BAD = (
    r"(?:the |an? )?(?:wrong|incorrect|false|untrue|invalid|impossible|inconsistent|unlikely|least|worst|eliminated"
    r"|excluded|ruled out|rejected|out)\b"
)
_SURELY = r"(?:(?:clearly|therefore|thus|hence|indeed|definitely|certainly|obviously|actually|also|both|all|then) )*"
_NOT_BE = rf"(?:n['’]t\b| {_SURELY}(?:{_BAD}|not\b|never\b|no longer\b))"
# The part before what is denied, and the part behind it.
_DENIED = re.compile(
    r"(?:\b(?:not|cannot be|never|neither|nor|(?:any|every)thing but|all but|except(?: for)?|other than|rather than"
    r"|instead of|excluding|exclude|eliminat(?:e|es|ed|ing)|(?:rule|rules|ruled|ruling) out|reject(?:s|ed|ing)?"
    rf"|unlike)\b|n['’]t\b|¬|!|\\neg|\\lnot)(?: be)?:? ?(?P<before>{_PAIR}(?:(?:, ?{_X})*,? (?:and|or|nor) {_X})?)"
    rf"|(?P<behind>{_X} {_ONE}{_NOT_BE}|{_LIST} {_MANY}{_NOT_BE}|{_PAIR}(?: {_ANY}{_NOT_BE}| can(?:not|['’]t)\b"
    rf"| ?\(?{_BAD}))[^,;.⟦]*(?:,? (?:and )?so (?:is|are) (?P<too>{_LIST}))?",
    re.IGNORECASE,
)
_AFFIRMED = re.compile(
    rf"(?P<first>{_X} (?:is|has to be|'s)|{_LIST} (?:are|have to be)|{_PAIR} (?:must be|should be)) {_SURELY}"
    r"(?:the )?(?:only |single |most |best |one )*(?:correct|right|true|best|accurate|valid|answers?|one|solution)\b"
    rf"(?P<tail>[^,;.⟦]*)(?:,? (?:and |but )?so (?:is|are) (?P<too>{_LIST}))?",
    re.IGNORECASE,
)
_OPENS = (
    r"(?:(?:(?:so|thus|hence|therefore|then|but|and|overall|finally|clearly|consequently|in conclusion|actually|instead"
    r"|rather|just kidding|on second thought|in fact|definitely|certainly|probably|most likely|likely|it follows that"
    r"|this means that|we conclude that|i conclude that|i think|i believe|i(?:['’]m| am) (?:sure|certain|confident)"
    r" that|we have|only|also)[,:]?|(?:no|wait|yes|correction|sorry|oops|hmm)[,:.]) )*"
)
_OPENS_WHOLE = re.compile(_OPENS, re.IGNORECASE)
_TAIL = re.compile(
    r"(?: (?:answers?|options?|choices?|one|here|too|as well|statements?|to the question|of all|overall))*[ .!)]*"
)
_IT_IS = (
    r"(?:(?:it|this|that|the (?:final |correct |right )?answer) ?(?:is|['’]s|must be|should be|has to be) (?:then )?)?"
)
_ALONE = re.compile(rf"{_OPENS}{_IT_IS}{_LIST}(?: (?:only|alone|again|indeed))?", re.IGNORECASE)
# In a list of verdicts: `B: correct`, `C) false`.
_VERDICT = re.compile(rf"({_X}) ?[:)–—-] ?(?=(?:in)?correct\b|wrong\b|right\b|true\b|false\b)", re.IGNORECASE)
_CONJUNCTION = re.compile(r" (?:and|but|so|while|whereas)$", re.IGNORECASE)
_UNSURE = re.compile(
    r"\?|\b(?:or|if|unless|not (?:sure|certain|clear)|unsure|uncertain|unclear"
    r"|no idea|maybe|perhaps|possibly|might|could|else|otherwise|either|between|partially|partly|almost"
    r"|nearly|vs|versus|depend(?:s|ing)?|at first|would)\b",
    re.IGNORECASE,
)
_REASON = re.compile(r"[ ,;(]*\b(?:because|since|as|due to|which|where)\b.*?(?=[.!?](?: |$)|$)", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?]) +|(?<=⟧) ?[.:](?: |$)")
_CLAUSE = re.compile(r"[,;:()—–]| - |\b(?=(?:so|but|thus|hence|therefore)\b)", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{3,}")
_STRANGER = re.compile(r"(?<![\w\\])[B-HJ-Z](?![\w'’])|\d")

# `A` before such a word is a label; before another it is an article, and so is `I` a person.
_AFTER_LABEL = (
    r"(?:is|are|was|were|must|should|would|will|has|have|can|cannot|could|isn|can|looks|seems|fits|and|or|nor|but|not|so"
    r"|because|since|as|which|if|then|vs|wrong|incorrect|correct|eliminated|ruled|too|also|except)\b"
)
_NOUN = r"(?i:\b(?:the )?(?:correct |right |final )?(?:options?|choices?|answers?|letters?|statements?) )"


@functools.lru_cache(maxsize=1024)
def _names(choices: Choices) -> tuple[re.Pattern[str], dict[str, int]]:
    """A pattern of what names an option within a statement, and the option's index by that name in lower case."""
    index: dict[str, int] = {}
    for i, (_, text) in enumerate(choices):
        name = bare(text).strip(" .").casefold()
        # Two options of one text, and texts that are hardly words, are named by label alone.
        if _WORD.search(name):
            index[name] = -1 if name in index else i
    texts = sorted((re.escape(name) for name, i in index.items() if i >= 0), key=len, reverse=True)
    texts = [rf"(?<!\w)(?i:(?:the )?{text})(?!\w)" for text in texts]
    labels = "|".join(sorted((re.escape(label) for label, _ in choices), key=len, reverse=True))
    alone = rf"(?<![\w.,/+^\\=<>-])(?P<alone>{labels})(?![\w^=]|['’]|[.,:/]\d)"
    bracketed = rf"[(\[]\s?(?P<bracketed>{labels})\s?[)\]]"
    named = rf"{_NOUN}[(\[]?(?P<named>(?i:{labels}))[)\]]?(?![\w^=]|['’]|[.,]\d)"
    return re.compile("|".join([f"(?P<text>{'|'.join(texts)})"] * bool(texts) + [named, bracketed, alone])), index


def _marked(plain: str, choices: Choices) -> str:
    pattern, index = _names(choices)
    labels = [label for label, _ in choices]

    def mark(name: re.Match[str]) -> str:
        parts = name.groupdict()
        if parts.get("text"):
            text = parts["text"].casefold()
            return f"⟦{index[text] if text in index else index[text.removeprefix('the ')]}⟧"
        label = parts["named"] or parts["bracketed"] or parts["alone"]
        if parts["alone"]:
            behind = plain[name.end() :]
            is_word = len(label) == 1 and label in "AaIi" and re.match(rf" (?!{_AFTER_LABEL})[a-z]", behind)
            is_number = label.isdigit() and (name.start() or not re.match(r"[).:]? ?(?:\(|[A-Za-z]|$)", behind))
            if is_word or is_number or (label.islower() and name.start()):
                return name[0]
        matching = _labels_of(label, choices, fold=bool(parts["named"]))
        # `(B) the powerhouse` is a label and what it stands for.
        is_head = parts["bracketed"] and not name.start() and re.match(rf" (?!{_AFTER_LABEL})", plain[name.end() :])
        return f"⟦{labels.index(next(iter(matching)))}⟧{';' * bool(is_head)}" if len(matching) == 1 else name[0]

    return pattern.sub(mark, plain)


def read_statement(text: str, choices: Choices) -> Statement:
    """What a short text says of the options."""
    longest = max((len(option) for _, option in choices), default=0)
    if len(text) < longest + _DRESS_LENGTH and (direct := one_option(text, choices)):
        return Statement(frozenset(direct), frozenset(), frozenset(direct))
    marked = _REASON.sub("", _VERDICT.sub(r"\1 is ", _marked(bare(text), choices)))
    sentences = [_read_sentence(sentence) for sentence in map(str.strip, _SENTENCE.split(marked)) if sentence]
    labels = [label for label, _ in choices]

    def of(*indices: set[int]) -> frozenset[str]:
        return frozenset(labels[i] for i in set().union(*indices))

    return Statement(
        of(*(sentence.named for sentence in sentences)),
        of(*(sentence.denied for sentence in sentences)),
        of(_indices(marked)),
        any(sentence.unclear for sentence in sentences),
        any(sentence.judges for sentence in sentences),
    )


class _Sentence(NamedTuple):
    named: set[int]
    denied: set[int]
    unclear: bool
    judges: bool


def _read_sentence(sentence: str) -> _Sentence:
    named: set[int] = set()
    denied: set[int] = set()
    judges = False

    def deny(match: re.Match[str]) -> str:
        nonlocal judges
        denied.update(_indices(match[0]))
        judges |= match["behind"] is not None
        return " , "

    rest = _DENIED.sub(deny, sentence)
    plain = rest
    for match in _AFFIRMED.finditer(rest):
        opening = _CLAUSE.split(rest[: match.start()])[-1].strip()
        if _OPENS_WHOLE.fullmatch(f"{opening} ".lstrip()) and _TAIL.fullmatch(match["tail"]):
            named |= _indices(match[0])
            judges = True
            plain = plain.replace(match[0], " , ", 1)
    stranger = False
    for clause in filter(None, map(str.strip, _CLAUSE.split(plain))):
        if _ALONE.fullmatch(_CONJUNCTION.sub("", clause.rstrip(" .!,;:"))):
            named |= _indices(clause)
        elif not _indices(clause) and not _WORD.search(clause) and _STRANGER.search(clause):
            stranger = True
    # A question or a condition may be about what is denied as well as about what is named.
    unclear = bool(_indices(sentence)) and (stranger or bool(_UNSURE.search(rest)))
    return _Sentence(named, denied, unclear, judges)


def _indices(marked: str) -> set[int]:
    return {int(index) for index in re.findall(r"⟦(\d+)⟧", marked)}
