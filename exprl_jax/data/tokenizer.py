"""Text to ids and back, for every kind of tokenizer we read, with one rule about trust.

A chat template is trusted: it may emit control tokens.  Everything else, problem texts and rollouts alike, is data: a
string such as `<|im_end|>` inside it is encoded as the ordinary characters it is made of.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exprl_jax.data.plain_text import PlainEncoders, check_lossless, fresh_name, plain_encoders, token_bytes
from exprl_jax.data.tokenizer_sources import library_tokenizer


class Message(NamedTuple):
    """One turn of a chat; `role` is ours (`system`, `user`, `assistant`), `content` may be anybody's."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its chat template; immutable, and safe to use from several threads.

    Attributes:
      name: what it was loaded from.
      date: the day that a chat template is told when it asks for today's; empty for none.
      vocab_size: largest id + 1.  A model's embedding may have more rows than that, never fewer.
      pad_id: fills unused slots; may equal an end id, so padding is told apart by masks, never by its value.
      bos_id: of the token that begins a text, where there is one; only the chat template writes it.
      eos_ids: each of them ends a response; the first is the one we write ourselves.
      token_bytes: the bytes each id stands for, `b""` for control tokens.  The bytes of a sequence are the
        concatenation of its tokens' bytes, so token ↔ byte offsets are cumulative sums.
    """

    name: str
    date: str
    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    token_bytes: tuple[bytes, ...]
    _library: Any = dataclasses.field(repr=False)
    _generation: Mapping[str, Any] = dataclasses.field(repr=False)
    _encoders: PlainEncoders = dataclasses.field(repr=False)
    _added: Mapping[str, int] = dataclasses.field(repr=False)
    _added_pattern: re.Pattern[str] = dataclasses.field(repr=False)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; names of special or added tokens in it come out as ordinary characters."""
        return self._encoders.first(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without control tokens; bytes that are not UTF-8 become U+FFFD.

        Equal to the library's decode except for a sentencepiece tokenizer's first space, which we keep: decoding is
        then additive over slices and agrees with `token_bytes`.
        """
        return b"".join(self.token_bytes[token] for token in ids).decode("utf-8", "replace")

    def spell(self, ids: Iterable[int]) -> list[str]:
        r"""Each of `ids` as people read it: its text, or a control token's name; bytes that are no whole characters of
        their own as `\xe2`."""
        names = {token: name for name, token in self._added.items()}
        pieces = [(self.token_bytes[token], names.get(token, "")) for token in ids]
        return [data.decode("utf-8", "backslashreplace") if data else name for data, name in pieces]

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a chat up to where the assistant's turn begins.

        Equal to the library's `apply_chat_template` for contents without control strings.  Contents cannot reach the
        template: it is run on placeholders, so neither control strings nor template code in them have any effect.

        Raises:
          ValueError: no messages, an unknown role, or a template that refuses or drops a message.
        """
        text, contents = self._template(messages)
        return self._encode_rendered(text, contents, self._encoders.first)

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
        count = messages[-1].content.count(marker) if messages and messages[-1].role == "user" else 0
        if not marker or marker != marker.strip() or count != 1:
            raise ValueError(
                f"the last message must be a user message that contains the marker {marker!r} once, got {count} times:"
                " choose a marker without outer spaces that occurs in no problem"
            )
        text, contents = self._template(messages)
        hole = list(contents)[-1]
        before, after = contents[hole].split(marker)
        start, end = fresh_name(), fresh_name()
        contents |= {start: before, end: after}
        head, rest = text.split(hole)
        encoders = self._encoders
        return SplitPrompt(
            head=tuple(self._encode_rendered(head + start, contents, encoders.first)),
            suffix=tuple(self._encode_rendered(end + rest + continuation, contents, encoders.inside)),
            encode=encoders.inside,
        )

    def save(self, folder: str | Path) -> None:
        """Writes files from which `load_tokenizer` and `transformers`, 4 and 5, load an equal tokenizer, chat template
        and end ids included."""
        self._library.save_pretrained(str(folder))
        _write_for_both_majors(Path(folder) / "tokenizer_config.json")
        special = {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        text = json.dumps({**self._generation, **special}, indent=2, sort_keys=True) + "\n"
        (Path(folder) / "generation_config.json").write_text(text, encoding="utf-8")

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
                placeholder = fresh_name()
                contents[placeholder] = core
                content = content.replace(core, placeholder)
            shielded.append({"role": message.role, "content": content})
        text = _render(self._library, shielded, generate=True, date=self.date)
        for placeholder, content in contents.items():
            if text.count(placeholder) != 1:
                raise ValueError(
                    f"the chat template of {self.name} writes the message {content[:40]!r}"
                    f" {text.count(placeholder)} times, expected once: it cannot be used here"
                )
        return text, contents

    def _encode_rendered(self, text: str, contents: Mapping[str, str], first: Callable[[str], list[int]]) -> list[int]:
        """Encodes rendered text: the template's added tokens to their ids, what lies between as plain text.

        Args:
          first: encodes what stands before the first control token.
        """
        fill = re.compile("|".join(contents) or "(?!)")
        ids: list[int] = []
        for position, piece, control in _split(self._added_pattern, text):
            plain = fill.sub(lambda match: contents[match.group()], piece)
            ids += self._encoders.after(plain) if position else first(plain)
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

    @property
    def frame_tokens(self) -> int:
        """Tokens of the prompt without what fills the hole."""
        return len(self.head) + len(self.suffix)

    def tail(self, text: str) -> list[int]:
        """The ids after `head` when `text` fills the hole."""
        return [*self.encode(text), *self.suffix]

    def tail_within(self, text: str, limit: int) -> list[int] | None:
        """`tail`, or None where the text alone has more tokens than the limit."""
        tail = self.tail(text)
        return tail if len(tail) - len(self.suffix) <= limit else None


def load_tokenizer(spec: str | Path, date: str = "") -> Tokenizer:
    """Loads a tokenizer.

    A tokenizer without a chat template gets the plain one of `tokenizer_sources.FALLBACK_TEMPLATE`.

    Args:
      spec: `byte`; a `.gguf` file; a folder with Hugging Face tokenizer files or a sentencepiece `tokenizer.model`; or
        a hub id.
      date: the day, as YYYY-MM-DD, that a chat template is told when it asks for today's: without it, prompts would be
        others tomorrow and on another host.

    Raises:
      ValueError: nothing there, a hub id without network, a kind of tokenizer whose tokens' bytes we cannot state, or a
        chat template that asks for the date where none is given.
    """
    source = library_tokenizer(str(spec))
    library, backend = source.tokenizer, source.tokenizer.backend_tokenizer
    added = {token.content: (index, token) for index, token in backend.get_added_tokens_decoder().items()}
    # A template may write blanks beside a token that takes them in; longer tokens come first.
    pattern = re.compile(
        "|".join(
            r"\s*" * token.lstrip + f"(?P<t{index}>{re.escape(content)})" + r"\s*" * token.rstrip
            for content, (index, token) in sorted(added.items(), key=lambda item: -len(item[0]))
        )
        or "(?!)"
    )
    described = json.loads(backend.to_str())
    table = token_bytes(backend, described, source.name)
    encoders = plain_encoders(backend, described, list(added), source.name)
    check_lossless(encoders, table, source.name)
    eos_ids = tuple(dict.fromkeys([*source.eos_ids, *_turn_end(library, pattern, added, date)]))
    if not eos_ids:
        raise ValueError(f"{source.name} has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return Tokenizer(
        name=source.name,
        date=date,
        vocab_size=len(table),
        pad_id=eos_ids[0] if library.pad_token_id is None else library.pad_token_id,
        bos_id=library.bos_token_id,
        eos_ids=eos_ids,
        token_bytes=table,
        _library=library,
        _generation=source.generation,
        _encoders=encoders,
        _added={content: index for content, (index, _) in added.items()},
        _added_pattern=pattern,
    )


def _split(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str, str | None]]:
    """Yields (position, plain piece, the added token after it, None at the end)."""
    position = 0
    for match in pattern.finditer(text):
        yield position, text[position : match.start()], match.group(match.lastgroup)
        position = match.end()
    yield position, text[position:], None


def _render(library: Any, messages: list[dict[str, str]], *, generate: bool, date: str) -> str:
    try:
        # Qwen3's template reads enable_thinking; others ignore it.
        return library.apply_chat_template(
            messages,
            chat_template=_dated(library.get_chat_template(), date),
            tokenize=False,
            add_generation_prompt=generate,
            enable_thinking=False,
        )
    except Exception as error:  # a template is a program: it can raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the chat template refuses the roles [{roles}]: {error}") from error


@functools.cache
def _dated(template: str, date: str) -> str:
    """A chat template whose `strftime_now` tells the given day at midnight, where the library's reads the clock.

    The library lets no function of ours into a template, so this one is a macro: %d and its like become the date's own.
    """
    if "strftime_now" not in template:
        return template
    if not date:
        raise ValueError("it asks for today's date; set the model's date in the config")
    day = datetime.datetime.fromisoformat(date)
    forms = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    told = {"%%": "\0"} | {form: day.strftime(form) for form in forms if day.strftime(form) != form} | {"\0": "%"}
    filters = "".join(f"|replace({form!r}, {value!r})" for form, value in told.items())
    # The newline goes with the block (`trim_blocks`), and the template still begins on a line of its own.
    # The argument has the library's name, by which a template may pass it.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def _turn_end(library: Any, pattern: re.Pattern[str], added: Mapping[str, tuple[int, Any]], date: str) -> list[int]:
    """The control token by which the chat template closes an assistant's turn, if it closes it with one."""
    answer = fresh_name()
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    text = _render(library, messages, generate=False, date=date)
    _, _, control = next(_split(pattern, text.partition(answer)[2]))
    return [] if control is None else [added[control][0]]


def _write_for_both_majors(path: Path) -> None:
    """Puts a tokenizer_config.json that transformers 5 has written into words that transformers 4 knows too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # 5 says TokenizersBackend
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
