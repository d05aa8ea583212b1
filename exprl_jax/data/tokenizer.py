"""Text to ids and back, for every kind of tokenizer we read, with one rule about trust.

A chat template is trusted: it may emit control tokens.  Everything else, problem texts and rollouts alike, is data: a
string such as `<|im_end|>` inside it is encoded as the ordinary characters it is made of.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exprl_jax.data.tokenizer_sources import byte_characters, library_tokenizer


class Message(NamedTuple):
    """One turn of a chat; `role` is ours (`system`, `user`, `assistant`), `content` may be anybody's."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its chat template; immutable, and safe to use from several threads.

    Attributes:
      name: what it was loaded from.
      vocab_size: largest id + 1.  A model's embedding may have more rows than that, never fewer.
      pad_id: fills unused slots; may equal an end id, so padding is told apart by masks, never by its value.
      eos_ids: each of them ends a response; the first is the one we write ourselves.
      token_bytes: the bytes each id stands for, `b""` for control tokens.  The bytes of a sequence are the
        concatenation of its tokens' bytes, so token ↔ byte offsets are cumulative sums.
    """

    name: str
    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]
    token_bytes: tuple[bytes, ...]
    _library: Any = dataclasses.field(repr=False)
    _opening: Any = dataclasses.field(repr=False)
    _following: Any = dataclasses.field(repr=False)
    _added: Mapping[str, int] = dataclasses.field(repr=False)
    _added_pattern: re.Pattern[str] = dataclasses.field(repr=False)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; names of special or added tokens in it come out as ordinary characters."""
        return self._opening.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without control tokens; bytes that are not UTF-8 become U+FFFD.

        Equal to the library's decode except for a sentencepiece tokenizer's first space, which we keep: decoding is
        then additive over slices and agrees with `token_bytes`.
        """
        return b"".join(self.token_bytes[token] for token in ids).decode("utf-8", "replace")

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a chat up to where the assistant's turn begins.

        Equal to the library's `apply_chat_template` for contents without control strings.  Contents cannot reach the
        template: it is run on placeholders, so neither control strings nor template code in them have any effect.

        Raises:
          ValueError: no messages, an unknown role, or a template that refuses or drops a message.
        """
        text, contents = self._template(messages)
        return self._encode_rendered(text, contents)

    def render_split(self, messages: Sequence[Message], marker: str, continuation: str = "") -> SplitPrompt:
        """Renders a chat whose last message holds a hole, for prompts that share everything before the hole.

        Args:
          messages: a chat that ends with a user message containing `marker` exactly once.
          marker: stands where the untrusted text goes.
          continuation: how the assistant's answer begins, e.g. `Score: `.

        Returns:
          The prompt as `head`, hole, `suffix`.  Token boundaries are forced at both edges of the hole, so that head
          and suffix are the same ids for whatever text fills it.

        Raises:
          ValueError: as `render`, or the marker is not there exactly once.
        """
        found = messages[-1].content.count(marker) if messages and messages[-1].role == "user" else 0
        if not marker or marker != marker.strip() or found != 1:
            raise ValueError(
                f"the last message must be a user message that contains the marker {marker!r} once, got {found} times:"
                " choose a marker without outer spaces that occurs in no problem"
            )
        text, contents = self._template(messages)
        hole = list(contents)[-1]
        before, after = contents[hole].split(marker)
        opening, closing = _fresh(), _fresh()
        contents |= {opening: before, closing: after}
        head, rest = text.split(hole)
        return SplitPrompt(
            head=tuple(self._encode_rendered(head + opening, contents)),
            suffix=tuple(self._encode_rendered(closing + rest + continuation, contents, opens=False)),
            encode=functools.partial(_ids, self._following),
        )

    def save(self, folder: str | Path) -> None:
        """Writes the files from which `transformers.AutoTokenizer` loads an equal tokenizer, chat template included."""
        self._library.save_pretrained(str(folder))

    def _template(self, messages: Sequence[Message]) -> tuple[str, dict[str, str]]:
        """The rendered chat with a placeholder for each content, and the contents by placeholder."""
        if not messages:
            raise ValueError("cannot render an empty chat: give at least one message")
        contents, shielded = {}, []
        for message in messages:
            if message.role not in ("system", "user", "assistant"):
                raise ValueError(f"message role must be system, user or assistant, got {message.role!r}")
            # A template may strip contents, so the outer whitespace stays visible to it.
            content, core = message.content, message.content.strip()
            if core:
                placeholder = _fresh()
                contents[placeholder] = core
                content = content.replace(core, placeholder)
            shielded.append({"role": message.role, "content": content})
        text = _render(self._library, shielded, generate=True)
        for placeholder, content in contents.items():
            if text.count(placeholder) != 1:
                raise ValueError(
                    f"the chat template of {self.name} writes the message {content[:40]!r}"
                    f" {text.count(placeholder)} times, expected once: it cannot be used here"
                )
        return text, contents

    def _encode_rendered(self, text: str, contents: Mapping[str, str], opens: bool = True) -> list[int]:
        """Encodes rendered text: the template's added tokens to their ids, what lies between as plain text."""
        fill = re.compile("|".join(contents) or "(?!)")
        ids: list[int] = []
        for position, piece, control in _split(self._added_pattern, text):
            plain = fill.sub(lambda found: contents[found.group()], piece)
            ids += _ids(self._opening if opens and position == 0 else self._following, plain)
            if control is not None:
                ids.append(self._added[control])
        return ids


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPrompt:
    """A prompt with one hole for untrusted text.

    Attributes:
      head: ids before the hole.
      suffix: ids after it: the rest of the message, the generation prompt, the continuation.
      encode: plain text → ids, for the hole.
    """

    head: tuple[int, ...]
    suffix: tuple[int, ...]
    encode: Any = dataclasses.field(repr=False)

    def tail(self, text: str) -> list[int]:
        """The ids after `head` when `text` fills the hole."""
        return [*self.encode(text), *self.suffix]


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      spec: `byte`; a `.gguf` file; a folder with Hugging Face tokenizer files or a sentencepiece `tokenizer.model`; or
        a hub id.

    A tokenizer without a chat template gets the plain one of `tokenizer_sources.FALLBACK_TEMPLATE`.

    Raises:
      ValueError: nothing there, a hub id without network, or a kind of tokenizer whose tokens' bytes we cannot state.
    """
    source = library_tokenizer(str(spec))
    library, backend = source.tokenizer, source.tokenizer.backend_tokenizer
    added = {token.content: (index, token) for index, token in backend.get_added_tokens_decoder().items()}
    pattern = "|".join(
        r"\s*" * token.lstrip + f"(?P<t{index}>{re.escape(content)})" + r"\s*" * token.rstrip
        for content, (index, token) in sorted(added.items(), key=lambda item: -len(item[0]))
    )
    serialized = json.loads(backend.to_str())
    token_bytes = _token_bytes(backend, serialized["decoder"] or {})
    opening, following = _plain_encoders(serialized, frozenset(added))
    for content, (index, _) in added.items():
        if index in _ids(opening, content) or index in _ids(following, content):
            raise ValueError(
                f"{source.name} encodes the plain text {content!r} as its control token {index}: contents could"
                " then pose as control tokens, so it cannot be used here"
            )
    eos_ids = tuple(dict.fromkeys([*source.eos_ids, *_turn_end(library, re.compile(pattern or "(?!)"), added)]))
    if not eos_ids:
        raise ValueError(f"{source.name} has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return Tokenizer(
        name=source.name,
        vocab_size=len(token_bytes),
        pad_id=eos_ids[0] if library.pad_token_id is None else library.pad_token_id,
        eos_ids=eos_ids,
        token_bytes=token_bytes,
        _library=library,
        _opening=opening,
        _following=following,
        _added={content: index for content, (index, _) in added.items()},
        _added_pattern=re.compile(pattern or "(?!)"),
    )


def _fresh() -> str:
    """A placeholder that no content can contain, because nobody can guess it."""
    return f"hole{secrets.token_hex(16)}"


def _ids(encoder: Any, text: str) -> list[int]:
    return encoder.encode(text, add_special_tokens=False).ids if text else []


def _split(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str, str | None]]:
    """Yields (position, plain piece, the added token after it, None at the end)."""
    position = 0
    for found in pattern.finditer(text):
        yield position, text[position : found.start()], found.group(found.lastgroup)
        position = found.end()
    yield position, text[position:], None


def _render(library: Any, messages: list[dict[str, str]], *, generate: bool) -> str:
    import jinja2

    try:
        # Qwen3's template reads enable_thinking; others ignore it.
        return library.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the roles [{roles}]: {error}") from error


def _turn_end(library: Any, pattern: re.Pattern[str], added: Mapping[str, tuple[int, Any]]) -> list[int]:
    """The control token by which the chat template closes an assistant's turn, if it closes it with one."""
    answer = _fresh()
    text = _render(
        library, [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}], generate=False
    )
    _, _, control = next(_split(pattern, text.partition(answer)[2]))
    return [] if control is None else [added[control][0]]


def _plain_encoders(serialized: dict[str, Any], added: frozenset[str]) -> tuple[Any, Any]:
    """Two copies of a tokenizer without its added tokens: for the beginning of a text, and for what follows.

    They differ for sentencepiece only, which puts a space before the first piece of a text.
    """
    from tokenizers import Tokenizer as Backend

    model, splitter = serialized["model"], serialized["pre_tokenizer"] or {}
    if "merges" in model:
        # Sentencepiece lists its control tokens as pieces, and converters derive merges from pieces.
        pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
        model = model | {"merges": [pair for pair in pairs if "".join(pair) not in added]}
    plain = serialized | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    plain |= {"model": model}
    opening = Backend.from_str(json.dumps(plain))
    if splitter.get("prepend_scheme") != "first":
        return opening, opening
    return opening, Backend.from_str(json.dumps(plain | {"pre_tokenizer": splitter | {"prepend_scheme": "never"}}))


def _token_bytes(backend: Any, decoder: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The bytes of every id: byte-level BPE, or sentencepiece (`▁` is a space, `<0x41>` a byte)."""
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    if "ByteLevel" in kinds:
        bytes_of = _byte_level_bytes
    elif kinds & {"Metaspace", "Replace"}:
        bytes_of = _sentencepiece_bytes
    else:
        raise ValueError(
            f"tokenizer decodes with {sorted(kinds) or 'nothing'}: only byte-level BPE and sentencepiece are supported"
        )
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    added = backend.get_added_tokens_decoder()
    for piece, index in vocabulary.items():
        if index not in added:
            table[index] = bytes_of(piece)
        elif not added[index].special:
            table[index] = piece.encode()
    return tuple(table)


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


def _byte_level_bytes(piece: str) -> bytes:
    # A piece with a character outside the alphabet stands for its own characters.
    return bytes(_BYTE_OF[character] for character in piece) if _BYTE_OF.keys() >= set(piece) else piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    escaped = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(escaped[1]) if escaped else piece.replace("▁", " ").encode()
