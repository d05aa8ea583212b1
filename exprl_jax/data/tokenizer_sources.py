"""Where tokenizers come from: Hugging Face files, a GGUF's vocabulary, or the 256 bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exprl_jax.gguf_reader import read_gguf

FALLBACK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers without a chat template: `System: …`, `User: …` and `Assistant: …` paragraphs."""

BYTE_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The byte tokenizer's chat: a role token, the content, an end token."""

_FILES = ["*.json", "tokenizer.model", "*.jinja", "*.txt"]
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types


class Source(NamedTuple):
    """A `transformers` tokenizer, and the end tokens that its own files name."""

    name: str
    tokenizer: Any
    eos_ids: tuple[int, ...]


def library_tokenizer(spec: str) -> Source:
    """Loads what `spec` names (see `load_tokenizer`) as a `transformers` tokenizer with a chat template."""
    path = Path(spec).expanduser()
    if spec == "byte":
        return _byte_source()
    if path.suffix == ".gguf":
        return _gguf_source(path)
    source = _folder_source(spec, path if path.is_dir() else _hub_folder(spec))
    if not source.tokenizer.chat_template:
        source.tokenizer.chat_template = FALLBACK_TEMPLATE
    return source


def byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself if printable, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _transformers() -> Any:
    # Without torch the library advises on stderr to install it; tokenizers need none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _hub_folder(spec: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) or spec.startswith("."):
        raise ValueError(f"no tokenizer at {spec!r}: no such folder; expected byte, a .gguf file, a folder or a hub id")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(spec, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"no tokenizer {spec!r}: not a folder here, and the hub does not give it ({reason}): check name and"
            " network, or download it and name the folder"
        ) from error


def _folder_source(name: str, folder: Path) -> Source:
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"no usable tokenizer in {name!r} ({reason}): expected tokenizer.json or tokenizer.model with a"
            " tokenizer_config.json"
        ) from error
    # A folder without tokenizer files gives an empty tokenizer of the config's model type, not an error.
    if backend.get_vocab_size() <= len(backend.get_added_tokens_decoder()):
        raise ValueError(
            f"no usable tokenizer in {name!r} (it has no vocabulary): expected tokenizer.json or tokenizer.model with a"
            " tokenizer_config.json"
        )
    eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    generation = folder / "generation_config.json"
    if generation.is_file():
        listed = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        eos_ids += listed if isinstance(listed, list) else [] if listed is None else [listed]
    if unknown := [index for index in eos_ids if backend.id_to_token(index) is None]:
        raise ValueError(f"{generation} names end tokens {unknown} that the tokenizer does not have")
    return Source(name, tokenizer, tuple(eos_ids))


def _byte_source() -> Source:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = _wrap(
        vocabulary,
        merges=[],
        splits="bytes",
        special=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        template=BYTE_TEMPLATE,
        roles={"pad_token": "<|pad|>", "eos_token": "<|end|>"},
    )
    return Source("byte", tokenizer, (tokenizer.eos_token_id,))


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"no tokenizer at {str(path)!r}: no such file")
    metadata = read_gguf(path).metadata

    def read(key: str) -> Any:
        if key not in metadata:
            raise ValueError(f"{path} has no {key}: it carries no tokenizer we can build")
        return metadata[key]

    kind, splits = read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")
    if kind != "gpt2" or splits not in _SPLITS:
        raise ValueError(
            f"{path} has a tokenizer of model {kind!r}, pre {splits!r}; supported are model 'gpt2' with pre"
            f" {', '.join(sorted(_SPLITS))}: convert it to a folder with tokenizer.json"
        )
    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    roles = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            roles[role] = tokens[read(f"tokenizer.ggml.{key}_token_id")]
    tokenizer = _wrap(
        {token: index for index, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")],
        splits=splits,
        special=[token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
        added=[token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED],
        template=read("tokenizer.chat_template") if "tokenizer.chat_template" in metadata else FALLBACK_TEMPLATE,
        roles=roles,
    )
    return Source(str(path), tokenizer, (read("tokenizer.ggml.eos_token_id"),))


_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = ("smollm", "qwen2")


def _wrap(
    vocabulary: dict[str, int],
    *,
    merges: Sequence[tuple[str, str]],
    splits: str,
    special: Sequence[str],
    added: Sequence[str] = (),
    template: str,
    roles: dict[str, str],
) -> Any:
    """A byte-level BPE as a `transformers` tokenizer; `splits` names its pre-tokenisation as GGUF does, or `bytes`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if splits == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words])
    elif splits == "qwen2":
        backend.normalizer = normalizers.NFC()
        by_pattern = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([by_pattern, by_bytes])
    else:
        backend.pre_tokenizer = by_bytes
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **roles
    )
