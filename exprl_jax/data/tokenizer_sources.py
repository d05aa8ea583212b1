"""Where tokenizers come from: Hugging Face files, a GGUF's vocabulary, or the 256 bytes."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exprl_jax.data.plain_text import byte_characters
from exprl_jax.files import read_json
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
# Of generation_config.json: who wrote it, and whether to make it anew from config.json.
_NOT_OURS = ("transformers_version", "_from_model_config")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types


class Source(NamedTuple):
    """A `transformers` tokenizer, and what its own files say of sampling.

    Attributes:
      eos_ids: end tokens that the files name.
      generation: generation_config.json, where there is one.
    """

    name: str
    tokenizer: Any
    eos_ids: tuple[int, ...]
    generation: Mapping[str, Any]


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
    except (ImportError, OSError, ValueError) as error:  # an ImportError: a SOCKS proxy without its package
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"no tokenizer {spec!r}: not a folder here, and the hub does not give it ({reason}): check name and"
            " network, or download it and name the folder"
        ) from error


@contextlib.contextmanager
def _usable(name: str) -> Iterator[None]:
    """Says in one line what is wrong with a tokenizer.

    The libraries raise whatever they come across in damaged files, bare `Exception` and RecursionError included.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no usable tokenizer in {name!r} ({reason}): expected tokenizer.json or tokenizer.model with a"
            " tokenizer_config.json"
        ) from error


def _folder_source(name: str, folder: Path) -> Source:
    transformers = _transformers()
    # By its class's name transformers 5 may rebuild what tokenizer.json describes, and leave parts out: SmolLM2 is said
    # to be a GPT2Tokenizer, and would lose the rule that splits digits.
    verbatim = (folder / "tokenizer.json").is_file()
    kind = transformers.PreTrainedTokenizerFast if verbatim else transformers.AutoTokenizer
    with _usable(name):
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
        backend = tokenizer.backend_tokenizer
        # A folder without tokenizer files gives an empty tokenizer of the config's model type, not an error.
        if backend.get_vocab_size() <= len(backend.get_added_tokens_decoder()):
            raise ValueError("it has no vocabulary")
        template = tokenizer.chat_template
        if not isinstance(template.get("default") if isinstance(template, dict) else template, str | None):
            raise ValueError("its chat template is not a text")
    path = folder / "generation_config.json"
    generation = {key: value for key, value in _json_if_there(path).items() if key not in _NOT_OURS}
    if generation.get("eos_token_id") is None:  # only then has config.json a say, as in transformers
        path = folder / "config.json"
    listed = _json_if_there(path).get("eos_token_id")
    eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_ids += [] if listed is None else _checked_ids(listed, tokenizer, path)
    return Source(name, tokenizer, tuple(eos_ids), generation)


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _checked_ids(listed: Any, tokenizer: Any, path: Path) -> list[int]:
    """End tokens, of which there may be one or a list.

    Raises:
      ValueError: they are no ids, or not of this tokenizer.
    """
    ids = listed if isinstance(listed, list) else [listed]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in ids):
        raise ValueError(f"{path}: eos_token_id is {listed!r}, expected the id of a token, or a list of ids")
    known = set(tokenizer.get_vocab().values())
    if unknown := [index for index in ids if index not in known]:
        raise ValueError(f"{path} names end tokens {unknown} that the tokenizer does not have; mend its eos_token_id")
    return ids


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
    return Source("byte", tokenizer, (tokenizer.eos_token_id,), {})


_GGUF = "tokenizer.ggml."
_GGUF_ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
_GGUF_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message to a tool


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"no tokenizer at {str(path)!r}: no such file")
    metadata = read_gguf(path).metadata

    def read(key: str) -> Any:
        if key not in metadata:
            raise ValueError(f"{path} has no {key}: it carries no tokenizer we can build")
        return metadata[key]

    kind, splits = read(_GGUF + "model"), read(_GGUF + "pre")
    if kind != "gpt2" or splits not in _SPLITS:
        raise ValueError(
            f"{path} has a tokenizer of model {kind!r}, pre {splits!r}; supported are model 'gpt2' with pre"
            f" {', '.join(sorted(_SPLITS))}: convert it to a folder with tokenizer.json"
        )
    tokens, types = read(_GGUF + "tokens"), read(_GGUF + "token_type")
    named = {key: f"{_GGUF}{key}_token_id" for key in (*_GGUF_ROLES.values(), *_GGUF_ENDS)}
    ids = {key: metadata[name] for key, name in named.items() if name in metadata}
    with _usable(str(path)):
        tokenizer = _wrap(
            {token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in read(_GGUF + "merges")],
            splits=splits,
            special=[token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
            added=[token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED],
            template=metadata.get("tokenizer.chat_template", FALLBACK_TEMPLATE),
            roles={role: tokens[ids[key]] for role, key in _GGUF_ROLES.items() if key in ids},
        )
    return Source(
        str(path), tokenizer, tuple(_checked_ids([ids[key] for key in _GGUF_ENDS if key in ids], tokenizer, path)), {}
    )


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
