"""Byte-level BPE in plain Python: split by regular expressions, then merge the best-ranked pair until none is left.

The word patterns are those llama.cpp documents for `tokenizer.ggml.pre`, not the ones of the `tokenizers` library.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words(text: str, pre: str) -> list[str]:
    """The pieces that BPE does not merge across."""
    if pre == "qwen2":
        return regex.findall(_QWEN2, unicodedata.normalize("NFC", text))
    pieces = [part for part in regex.split(r"(\p{N})", text) if part]
    return [word for piece in pieces for word in regex.findall(_GPT2, piece)]


def encode(text: str, pre: str, tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[int]:
    """The ids of `text`, by the definition."""
    ids, rank = {token: index for index, token in enumerate(tokens)}, {pair: at for at, pair in enumerate(merges)}
    out = []
    for word in words(text, pre):
        parts = [_character(byte) for byte in word.encode()]
        while True:
            ranked = [(rank[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in rank]
            if not ranked:
                break
            at = min(ranked)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out += [ids[part] for part in parts]
    return out


def _character(byte: int) -> str:
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return chr(byte) if byte in shown else chr(256 + [b for b in range(256) if b not in shown].index(byte))
