"""What a judge is asked, as people read it: control tokens by name, the judged text apart from what frames it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from exprl_jax import config
from exprl_jax.data.tokenizer import Message, SplitPrompt, Tokenizer
from exprl_jax.reward.checklists import ChecklistJudge
from exprl_jax.reward.endpoint_judge import EndpointJudge
from exprl_jax.reward.judge import Judge
from exprl_jax.reward.judgements import MARKER


def written(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of some ids, with control tokens by their names."""
    runs = itertools.groupby(ids, key=lambda token: bool(tokenizer.token_bytes[token]))
    return "".join(tokenizer.decode(run) if text else "".join(tokenizer.spell(run)) for text, run in runs)


def asked_model(judge: config.Judge) -> dict[str, str]:
    """Where a judge is, and how it is read."""
    readout = "scores" if judge.backend == "function" else judge.readout
    return {"backend": judge.backend, "model": judge.source, "readout": readout}


def score_question(judge: Any, problem: str, trace: str) -> dict[str, Any] | None:
    """The prompt that asks for a score of a trace; None of a judge that takes no prompt."""
    judge = judge.asking(problem) if isinstance(judge, ChecklistJudge) else judge
    if isinstance(judge, Judge):
        return split_question(judge.tokenizer, judge.prompts.score[problem], trace)
    return chat_question(judge.score_chats[problem], trace) if isinstance(judge, EndpointJudge) else None


def verdict_question(judge: Any, problem: str, response: str) -> dict[str, Any] | None:
    """The prompt that asks whether an open-ended answer is right; None of a judge that takes no prompt."""
    judge = judge.inner if isinstance(judge, ChecklistJudge) else judge
    if isinstance(judge, Judge):
        return split_question(judge.tokenizer, judge.prompts.verify[problem], response)
    return chat_question(judge.verdict_chats[problem], response) if isinstance(judge, EndpointJudge) else None


def split_question(tokenizer: Tokenizer, prompt: SplitPrompt, text: str) -> dict[str, Any]:
    """Of a model on the mesh."""
    return {
        "before": written(tokenizer, prompt.head),
        "text": text,
        "after": written(tokenizer, prompt.suffix),
        "frame_tokens": prompt.frame_tokens,
        "text_tokens": len(prompt.encode(text)),
    }


def chat_question(messages: Sequence[Message], text: str) -> dict[str, Any]:
    """Of an endpoint, whose server makes a prompt of the chat and counts its tokens."""
    chat = "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)
    before, after = chat.split(MARKER)
    return {"before": before, "text": text, "after": after, "frame_tokens": None, "text_tokens": None}
