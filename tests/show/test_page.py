"""A record as a page: every line within the width, what is hidden behind its bar, and the numbers in their columns."""

import random
import re

import pytest

from exprl_jax.show.page import page_lines
from exprl_jax.show.terminal import Paper, columns

PIECES = ("a", " the", "\n", "é", "数学", "\\xc3", "\x1b[2J", "<|end|>", "x" * 150, "\u0301", "")


def question(reference):
    before = f"<|system|>Grade.<|user|>Problem:\nWhy?\n\nReference solution:\n{reference}\n\nAttempt:\n"
    return {"before": before, "text": "It is.\nSo.", "after": "\n\nOne digit.", "frame_tokens": 99, "text_tokens": 9}


def record_of(task, segments=12, rollouts=4):
    """A record with everything in it, of texts that are hard to lay out."""
    rng = random.Random(0)
    pieces = [rng.choice(PIECES) for _ in range(60)]
    reference = "First line\nsecond " + "long " * 40
    made = [
        {
            **{"rollout": n, "response": "".join(pieces), "length": 60, "ended": n > 0, "verdict": "correct"},
            "segments": [
                {
                    **{"text": "".join(pieces[5 * s : 5 * s + 5]), "score": None if s == 2 else 0.5, "cut": False},
                    **{"advantage": None if s == 3 else -0.25, "judge": "Half.\nScore: 3", "asked": True},
                    **{
                        "tokens": [5 * s, 5 * s + 5],
                        "last_token": pieces[5 * s + 4],
                        "digits": [0.1, 0.2, 0.4, 0.2, 0.1],
                    },
                }
                for s in range(segments)
            ],
            "pieces": pieces,
            "logratio": [rng.uniform(-3, 3) for _ in pieces],
        }
        for n in range(rollouts)
    ]
    judge = {"backend": "local", "model": "some/" + "long" * 30, "readout": "logits", "question": question(reference)}
    said = [{"text": "".join(pieces), "no_yes": None, "score": None, "cut": True}] + [None] * (rollouts - 1)
    answers = [
        {"pass": name, "segment": None, "repeat": 0, "score": 0.5, "text": "Half.", "cut": True, "digits": None}
        for name in ("correct", "none", "wrong", "reference_last")
    ]
    answers = [answer | {"question": question(reference)} for answer in answers]
    return {
        **{"task": task, "id": "set/" + "7" * 90, "kind": "math", "domain": "math", "problem": "Why?", "choices": []},
        **{"reference": reference, "answer": "gravity", "route": "process", "live": True, "shown": 0, "rollouts": made},
        "policy": {"weights": "runs/" + "w" * 90, "prompt": "<|user|>Why?<|assistant|>", "prompt_tokens": 3},
        "teacher": {"weights": "t", "prompt": f"Why?\n{reference}\nNow you.", "prompt_tokens": 9},
        "judge": judge | {"asks": "prefix", "segment": segments - 1, "said": said},
        "judges": [{"name": "4B", "answers": answers} | judge, {"name": "8B", "answers": []} | judge],
        "segments": made[0]["segments"],
        "annotator": judge | {"text": "{}", "fields": {"counting": 1, "geometric": 0}, "tokens": 9},
        **{"prompt_pieces": pieces, "target_pieces": pieces, "target_tokens": 60},
        "labels": [
            {"text": "".join(pieces), "score": 0.3, "share": 0.25, "target_pieces": pieces, "target_tokens": 60}
            for _ in range(segments)
        ],
        **{"rollout": 1, "response": "It is.", "verdict": "wrong", "warnings": ["something " + "long " * 50]},
    }


@pytest.mark.parametrize("width", [60, 77, 120])
@pytest.mark.parametrize("task", ["rl", "distill", "sft", "judge", "evaluate", "calibrate", "annotate", "label"])
def test_every_line_is_within_the_width_and_commands_nothing(task, width):
    lines = page_lines(record_of(task), 1, 1, Paper(width, False))
    assert all(columns(line) <= width and line.isprintable() for line in lines)
    assert lines[0].startswith("━━ problem 1 of 1 ") and any(line.startswith("! something long") for line in lines)
    hidden = [line for line in lines if "First line" in line]
    assert all(line == "┃ First line" for line in hidden)
    # In a section of its own, and again in the prompt of whatever sees it.
    assert len(hidden) == (0 if task == "sft" else 2)


@pytest.mark.parametrize(
    "said, shown",
    [
        ({"text": None, "no_yes": [0.25, 0.5], "score": None, "cut": False}, "P(no) 0.250  P(yes) 0.500"),
        ({"text": None, "no_yes": None, "score": 0.7, "cut": False}, "score 0.7"),
        ({"text": None, "no_yes": None, "score": None, "cut": False}, "none"),
        (None, "not asked, or the response is over max_trace_tokens"),
    ],
)
def test_a_function_has_no_prompt_and_every_answer_about_an_answer_is_shown(said, shown):
    record = record_of("evaluate")
    record["judge"] = record["judge"] | {"backend": "function", "question": None, "said": [said] * 4}
    lines = page_lines(record, 1, 1, Paper(77, False))
    assert "  a function, which takes no prompt" in lines
    at = next(n for n, line in enumerate(lines) if line.startswith("── judge's verdict"))
    assert shown in lines[at] + lines[at + 1]


def test_colours_change_no_text():
    plain, coloured = (page_lines(record_of("rl"), 1, 1, Paper(100, colour)) for colour in (False, True))
    stripped = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured]
    assert stripped == plain and stripped != coloured


def test_a_group_is_a_row_a_rollout_with_its_scores_and_advantages():
    record = record_of("rl", segments=3, rollouts=2)
    lines = page_lines(record, 1, 1, Paper(100, False))
    at = next(n for n, line in enumerate(lines) if line.startswith("── group"))
    assert lines[at].endswith("0 of 2 scored ─")  # the last segment of neither has one
    assert lines[at + 2].split() == "▸ 0 60 overlong correct 0.50 0.50 none -0.25 -0.25 -0.25".split()
    assert lines[at + 3].split() == "1 60 ended correct 0.50 0.50 none -0.25 -0.25 -0.25".split()
