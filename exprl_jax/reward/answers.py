"""Reading what a judging model wrote: the answer without its thoughts, and the value on its last labelled line.

A model that thinks writes its thought first, between tags of its own or on a channel of its own, and the answer after
it.  Whatever stands in a thought is no answer, however much it looks like one:

    <think> ... Score: 2 ... </think>  Nearly right.  Score: 4        the answer is `Nearly right.  Score: 4`
              ... Score: 2 ... </think>  Score: 4                     the same, where the prompt opened the thought
    <think> ... Score: 2 ...                                          no answer: the thought was cut, or never ended

Where it cannot be told whether a text is thought or answer, there is no answer.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# --- thoughts --------------------------------------------------------------------------------------------------------

# <think> <thought_process> <seed:think> <|begin_of_thought|> <|START_THINKING|> ◁think▷ [THINK] <|channel>thought, and
# what closes them.
# A tag in a code span is spoken of, not used, so spans are matched first.
_TAG = re.compile(
    r"(?<!`)(?P<ticks>`++)[^`\n]+(?P=ticks)"
    r"|(?:<\|?|◁|\[(?=/?think\]))\s*(?P<close>/\s*|end_(?:of_)?)?(?:begin_of_|start_|seed:)?"
    r"(?P<name>think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)(?:[_-]\w+)?"
    r"(?:\s+\w+\s*=[^<>\n]*)?\s*(?:\|?>|▷|\])"
    r"|(?P<channel><\|channel>\s*(?:thought|analysis)\b|(?P<channel_close><channel\|>))",
    re.IGNORECASE,
)
# What is left of `<|channel|>analysis<|message|>We ...` where a server drops control tokens.
_BARE_ANALYSIS, _BARE_FINAL = re.compile(r"\s*analysis(?=[A-Z])"), "assistantfinal"


def answer_of(text: str) -> str:
    """What follows the thoughts of a model's text; empty where a thought has not ended.

    A closing tag without an opening one ends a thought that the prompt opened.  A tag that only another kind of tag
    closes is open.
    """
    _, channel, rest = text.rpartition("<|channel|>")
    if channel:
        name, _, message = rest.partition("<|message|>")
        text = message if name.split()[:1] == ["final"] else ""
    elif _BARE_ANALYSIS.match(text):
        _, final, message = text.rpartition(_BARE_FINAL)
        text = message if final else ""
    depth: collections.Counter[str] = collections.Counter()
    start = end = 0
    for tag in _TAG.finditer(text):
        kind = (tag["name"] or tag["channel"] and "channel" or "").lower()
        if not kind:
            continue
        if tag["close"] or tag["channel_close"]:
            depth[kind], start = max(depth[kind] - 1, 0), tag.end()
        elif not depth[kind] or text[end : tag.start()].strip():
            # Else the model repeats the tag that the prompt wrote.
            depth[kind] += 1
        end = tag.end()
    return "" if any(depth.values()) else text[start:]


def opened_thought(prompt: str) -> str:
    """The tag by which a prompt's end opens a thought; empty where it opens none.

    Put before what the model wrote, it makes an unfinished thought one that `answer_of` knows.
    """
    tags = [tag for tag in _TAG.finditer(prompt) if not tag["ticks"]]
    if not tags or tags[-1]["close"] or tags[-1]["channel_close"] or prompt[tags[-1].end() :].strip():
        return ""
    return tags[-1].group()


# --- the labelled line -----------------------------------------------------------------------------------------------

# What a line is dressed in; <4> and <yes> are brackets around a value, and stay.
_DRESS = re.compile(
    r"</?(?:b|strong|i|em|u|p|br|span|div|h[1-6]|mark|code|answer|response|output|solution)(?:\s[^<>]*)?/?>"
    r"|<\|[^|<>\n]{1,40}\|>|</?s>|<eos>|<end_of_turn>",
    re.IGNORECASE,
)
_BRACKETS = (
    *(("", ""), ("[", "]"), ("(", ")"), ("<", ">"), ("{", "}")),
    *((rf"\{command}{{", "}") for command in ("boxed", "text", "textbf", "mathbf")),
)

_FULL_WIDTH = {0xFF00 + at: 0x20 + at for at in range(1, 0x5F)}


def bracketed(value: str) -> tuple[str, ...]:
    """A value bare and in each kind of brackets, as `read_labelled` compares it."""
    return tuple(f"{left}{value}{right}" for left, right in _BRACKETS)


def read_labelled(text: str, label: str, values: Mapping[str, T], *, at_end: bool = False) -> T | None:
    """What the last line with the label says, or None where it says none of `values`.

        labelled   ::=  ornament* name ornament* separator value ["."]     in any case, alone on its line
                     |  ornament* name ornament* separator  newline+  value ["."]
                     |  heading  newline+  value ["."]
        heading    ::=  "#"+ name  |  "**" name "**"  |  "__" name "__"
        name       ::=  ("final" | "overall")* label
        separator  ::=  ":" | "=" | a dash with blanks on both sides
        ornament   ::=  blanks, * _ ` and tags like <b> (anywhere), > # - (before the label), $ \\( \\) (in the value)

    A line that begins like a labelled one and goes on differently is the last labelled line all the same, and there
    is no value: an earlier line does not stand in for it.  Nor is there one where a second value follows on a line of
    its own.

    Args:
      text: what a model wrote; its thoughts are left out.
      label: a word.
      values: what can be said, in lower case, by how it is written.
      at_end: nothing may follow the value.
    """
    name = rf"(?:(?:final|overall)\s+)*{label}"
    labelled = re.compile(rf"[\s>#*_`-]*{name}[\s*_`]*(?:[:=：]|(?<=\s)[-–—](?=\s|$))(.*)", re.IGNORECASE)
    heading = re.compile(rf"[\s>-]*(?:#+[\s*_]*{name}[\s*_]*|(\*\*|__){name}\1\s*)", re.IGNORECASE)
    lines = [_DRESS.sub(" ", line) for line in answer_of(text).splitlines()]
    for i in reversed(range(len(lines))):
        line = labelled.fullmatch(lines[i])
        if not line and not heading.fullmatch(lines[i]):
            continue
        beside = _plain(line[1]) if line else ""
        below = [plain for rest in lines[i + 1 :] if (plain := _plain(rest.lstrip("> \t")))]
        value, *more = [beside, *below] if beside else [*below, ""]
        if any(more) and (at_end or (not beside and more[0] in values)):
            return None
        return values.get(value)
    return None


def _plain(value: str) -> str:
    """A value without emphasis and outer blanks, in lower case, and with no blanks beside brackets."""
    value = re.sub(r"[*_`$\u200b-\u200d\u2060\ufeff]+|\\[()\[\]]", "", value.translate(_FULL_WIDTH))
    value = re.sub(r"\s*([\[\](){}<>/])\s*", r"\1", " ".join(value.split()))
    return value.removesuffix(".").rstrip().lower()
