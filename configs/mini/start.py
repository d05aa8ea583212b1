"""The folder that the miniature's models start from: a tokenizer of the task's words, and an architecture.

An ordinary Hugging Face folder without weights, for `random:configs/mini/models/start`.  Every fixed part of the
product's prompts is one token, so that prompts are short.  The parts are taken from the prompts themselves, and a test
notices when one has been reworded since the folder was written.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from configs.mini.task import LABELS, MODULUS, OPERATIONS, REGISTERS
from exprl_jax.data.prompts import SYSTEM
from exprl_jax.reward.judge_prompts import CONTINUATION, Unit, blind_messages, judge_messages

CONTROL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# 0.35 million parameters.
ARCHITECTURE = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=24,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=512,
    hidden_act="silu",
    attention_bias=False,
    use_sliding_window=False,
    torch_dtype="float32",
)
_SPACE = "\u2581"  # what stands for a blank in a piece


def words() -> list[str]:
    """The tokenizer's vocabulary, no word twice; every printable ASCII character is a word, so all text has ids."""
    values = [f"{value:02d}" for value in range(MODULUS)]
    headings = ["### A ", *(f"\n### {label} " for label in LABELS[1:])]
    tags = [f"{blank}{label}{register}" for label in LABELS for register in REGISTERS for blank in ("", " ")]
    boxes = [f"{before}\\boxed{{" for before in ("", " ", "\n")]
    characters = [*map(chr, range(32, 127)), "\n"]
    return list(dict.fromkeys([*values, *headings, *tags, *boxes, *fixed_texts(), *OPERATIONS, *characters]))


def fixed_texts() -> list[str]:
    """What the prompts of policy and judge hold besides problem, reference and trace."""
    texts = [SYSTEM, *CONTINUATION.values(), "\nScore: "]
    for readout in CONTINUATION:
        chats = [judge_messages("PROBLEM", (), "REFERENCE", "math", unit, readout, "TRACE") for unit in get_args(Unit)]
        for chat in [*chats, blind_messages("PROBLEM", (), "math", readout, "TRACE")]:
            for message in chat:
                texts += re.split("PROBLEM|REFERENCE|TRACE", message.content)
    return [text for text in dict.fromkeys(texts) if text]


def write(folder: pathlib.Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    # Equal scores make the longest words win: a text is cut into as few of them as can be.
    scores = [(word.replace(" ", _SPACE), -1.0) for word in words()]
    scores += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]  # of characters that no word holds
    vocabulary = [("<unk>", -20.0), *scores]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    blanks = dict(replacement=_SPACE, prepend_scheme="never", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**blanks)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**blanks)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    first = len(vocabulary)
    ids = {name: first + i for i, name in enumerate(CONTROL)}
    named = dict(eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>", chat_template=CHAT)
    described = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, **named)
    rows = -(-(first + len(CONTROL)) // 8) * 8
    config = ARCHITECTURE | dict(vocab_size=rows, eos_token_id=ids["<|end|>"], pad_token_id=ids["<|pad|>"])
    for name, content in (("tokenizer_config.json", described), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
