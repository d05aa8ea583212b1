"""Plain text to ids and back: what each id stands for, in bytes, and encoders that know no control tokens.

The control tokens of a rendered chat cut it into pieces of plain text, and a hole for untrusted text cuts it once more:

    <s> [user] Is it 4? </s> [assistant] It is @HOLE@ .
       ^--------------^     ^-------------^------^---^
            after                after     inside inside         (`first` is a piece that no control token precedes)

It matters which is which because sentencepiece puts a space before a piece: always, before the first alone, or never.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_CURE = (
    "only tokenizers with a token for every byte are safe here: byte-level BPE, or sentencepiece (BPE or Unigram) with"
    " byte_fallback; name a model that has one"
)

# Text that must survive: blanks, program text, accents, other scripts, mathematics, and signs that "compatibility"
# normalisers rewrite, by which x² would become x2.
_PROBE = (
    "".join(map(chr, range(0x21, 0x7F))) + " a  b\t\tc\n\n    d\r\ne  naïve Übergröße 日本語 한국어 العربية 🙂"
    " x² ½ ≤ ∑√π → ① ﬁ １２ … <0x41> end \n"
)


class PlainEncoders(NamedTuple):
    """From text to ids, by where the text stands; see the drawing above."""

    first: Callable[[str], list[int]]
    after: Callable[[str], list[int]]
    inside: Callable[[str], list[int]]


def fresh_name() -> str:
    """A name that no text can contain, because nobody can guess it."""
    return f"hole{secrets.token_hex(16)}"


def plain_encoders(backend: Any, described: Mapping[str, Any], added: Sequence[str], name: str) -> PlainEncoders:
    """Encoders that take the contents of added tokens for the ordinary characters that they are made of.

    Args:
      backend: a `tokenizers.Tokenizer`.
      described: its own JSON, parsed.
      added: contents of its added tokens.
      name: of the tokenizer, for messages.

    Raises:
      ValueError: the text of an added token is encoded as that token even so.
    """
    from tokenizers import Tokenizer

    whole = {**described, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    whole["model"] = _without_added(whole["model"], frozenset(added))
    inside = whole | {part: _without_space(whole[part]) for part in ("normalizer", "pre_tokenizer")}
    # As plain text the name of a byte token would be taken for that byte, so it is never encoded in one piece.
    apart = re.compile("(?<=<)(?=0x[0-9A-F]{2}>)" if whole["model"].get("byte_fallback") else "(?!)")
    first = Tokenizer.from_str(json.dumps(whole))
    within = first if inside == whole else Tokenizer.from_str(json.dumps(inside))
    # "first" is the one scheme that tells a piece behind a control token from the first one.
    after = within if '"prepend_scheme": "first"' in json.dumps(whole["pre_tokenizer"]) else first
    encoders = PlainEncoders(*(functools.partial(_encode, start, within, apart) for start in (first, after, within)))
    ids = backend.get_vocab(with_added_tokens=True)
    for content in added:
        if any(ids[content] in encode(content) for encode in encoders):
            raise ValueError(
                f"{name} encodes the plain text {content!r} as its control token {ids[content]}: contents could then"
                " pose as control tokens, so it cannot be used here; name a model with another tokenizer"
            )
    return encoders


def token_bytes(backend: Any, described: Mapping[str, Any], name: str) -> tuple[bytes, ...]:
    """The bytes of every id: byte-level BPE, or sentencepiece (`▁` is a space, `<0x41>` a byte).

    Raises:
      ValueError: another kind of tokenizer, or an id that the library decodes to other text.
    """
    decoder = described["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    if "ByteLevel" in kinds:
        bytes_of = _byte_level_bytes
    elif kinds & {"Metaspace", "Replace"}:
        bytes_of = functools.partial(_sentencepiece_bytes, bool(described["model"].get("byte_fallback")))
    else:
        raise ValueError(f"{name} decodes with {', '.join(sorted(kinds)) or 'nothing'}: {_CURE}")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    added = backend.get_added_tokens_decoder()
    for piece, index in vocabulary.items():
        if index not in added:
            table[index] = bytes_of(piece)
        elif not added[index].special:
            table[index] = piece.encode()
    decoded = backend.decode_batch([[index] for index in range(len(table))], skip_special_tokens=False)
    for index, (ours, theirs) in enumerate(zip(table, decoded, strict=True)):
        text = ours.decode("utf-8", "replace")
        # Sentencepiece drops the first space of a text, which would make decoding depend on where a slice begins.
        if ours and index not in added and "\ufffd" not in text and theirs not in (text, text.removeprefix(" ")):
            if not re.fullmatch(r"<0x[0-9A-F]{2}>", theirs):  # what a decoder without ByteFallback makes of a byte
                raise ValueError(f"{name} decodes id {index} as {theirs!r}, not as {text!r}: {_CURE}")
    return tuple(table)


def check_lossless(encoders: PlainEncoders, table: Sequence[bytes], name: str) -> None:
    """Refuses a tokenizer that loses or changes text; other forms of the same characters (NFC) are the same text.

    Raises:
      ValueError: names characters that are lost or changed.
    """
    # A letter in front: the space that sentencepiece puts there is then the only one to leave out.
    changed = [part for part in [*dict.fromkeys(_PROBE), _PROBE] if not _survives(f"a{part}", encoders, table)]
    if changed:
        raise ValueError(f"{name} loses or changes text, for instance {', '.join(map(repr, changed[:5]))}: {_CURE}")


def _survives(text: str, encoders: PlainEncoders, table: Sequence[bytes]) -> bool:
    try:
        back = b"".join(table[index] for index in encoders.first(text)).decode("utf-8", "replace")
    except Exception:  # noqa: BLE001 – `tokenizers` raises bare exceptions where a token is missing: so it is lost
        return False
    return unicodedata.normalize("NFC", back.removeprefix(" ")) == unicodedata.normalize("NFC", text)


def _encode(start: Any, inside: Any, apart: re.Pattern[str], text: str) -> list[int]:
    """The ids of `text`, cut where `apart` matches; what follows a cut goes on in the same text."""
    if not text:
        return []
    first, *rest = apart.split(text)
    ids = start.encode(first, add_special_tokens=False).ids
    return [*ids, *(index for part in rest for index in inside.encode(part, add_special_tokens=False).ids)]


def _without_added(model: Mapping[str, Any], added: frozenset[str]) -> dict[str, Any]:
    """A model that cannot make an added token out of its characters; ids stay what they are."""
    if "merges" in model:
        # Sentencepiece lists its control tokens as pieces, and converters derive merges from pieces.
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        return model | {"merges": [pair for pair in pairs if "".join(pair) not in added]}
    names = {content: fresh_name() for content in added}
    if isinstance(model["vocab"], list):  # Unigram
        return model | {"vocab": [[names.get(piece, piece), score] for piece, score in model["vocab"]]}
    unknown = model.get("unk_token")
    vocabulary = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    return model | {"vocab": vocabulary, "unk_token": names.get(unknown, unknown)}


def _without_space(part: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, but for the space that it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    lists = {key: [_without_space(inner) for inner in part[key]] for key in part if key in _LISTS}
    return part | {key: [inner for inner in inners if inner] for key, inners in lists.items()}


_LISTS = ("normalizers", "pretokenizers")


def byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself if printable, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def _byte_level_bytes(piece: str) -> bytes:
    # A piece with a character outside the alphabet stands for its own characters.
    return bytes(_BYTE_OF[character] for character in piece) if _BYTE_OF.keys() >= set(piece) else piece.encode()


def _sentencepiece_bytes(byte_fallback: bool, piece: str) -> bytes:
    escaped = re.fullmatch(r"<0x([0-9A-F]{2})>", piece) if byte_fallback else None
    return bytes.fromhex(escaped[1]) if escaped else piece.replace("▁", " ").encode()
