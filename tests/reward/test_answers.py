"""Reading what a judging model wrote: labels given by hand, before the reader was written."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_jax.reward.answers import answer_of, opened_thought
from exprl_jax.reward.judge_prompts import parse_score
from exprl_jax.reward.verifiers.open_ended import parse_verdict
from exprl_jax.reward.verifiers.verdict import Verdict

# Where nothing else is said a score is 4 and a verdict yes; LOW stands for the lines that must not be read.
HIGH, LOW = ("Score: 4", "Verdict: yes"), ("Score: 2", "Verdict: no")
VERDICTS = {4: Verdict.correct, 2: Verdict.wrong, None: Verdict.missing}

# (what the judge wrote, with {high} and {low} for a line; the score to read)
THOUGHTS = [
    # An unfinished thought says nothing.
    ("<think>{high}", None),
    ("<think>\n{high}\n", None),
    ("  \n<think>\nIt is nearly right.\n\n{high}\n\nBut wait, the last step", None),
    ("<thinking>\n{high}", None),
    ("<THINK>\n{high}", None),
    ("<Thinking>\n{high}", None),
    ("<thought>\n{high}", None),
    ("<thoughts>\n{high}", None),
    ("<reasoning>\n{high}", None),
    ("<reason>\n{high}", None),
    ("<scratchpad>\n{high}", None),
    ("<reflection>\n{high}", None),
    ("<analysis>\n{high}", None),
    ("<thinking_process>\n{high}", None),
    ("<seed:think>\n{high}", None),
    ('<think time="3 s">\n{high}', None),
    ("< think >\n{high}", None),
    ("◁think▷\n{high}", None),
    ("[THINK]\n{high}", None),
    ("[think]{high}", None),
    ("<|think|>\n{high}", None),
    ("<|begin_of_thought|>\n{high}", None),
    ("<|START_THINKING|>{high}", None),
    ("<|channel>thought\n{high}", None),
    ("Okay. <think>\n{high}", None),
    ("{low}\n<think>\nno, better\n{high}", None),
    ("{high}\n<think>", None),
    # A thought that is closed, and nothing after it.
    ("<think>\n{high}\n</think>", None),
    ("<think>\n{high}\n</think>\n\n", None),
    ("<think>\n{high}\n</think>\nThe attempt is nearly right.", None),
    ("It is nearly right.\n{high}\n</think>", None),
    ("{high}\n</think>\n", None),
    ("<thinking>{high}</thinking>", None),
    ("<reasoning>\n{high}\n</reasoning>\n", None),
    ("◁think▷{high}◁/think▷", None),
    ("[THINK]\n{high}\n[/THINK]", None),
    ("<|begin_of_thought|>\n{high}\n<|end_of_thought|>", None),
    ("{high}\n<think>I was right.</think>", None),
    ("<think>a</think>\n{high}\n<think>b</think>", None),
    # The answer is what follows the last thought.
    ("<think>\n{low}\n</think>\n{high}", 4),
    ("<think>{low}</think>{high}", 4),
    ("<think>\n\n</think>\n\n{high}", 4),
    ("<think></think>{high}", 4),
    ("{low}\n</think>\n\n{high}", 4),
    ("<thinking>\n{low}\n</thinking>\nNearly right.\n{high}", 4),
    ("<THINK>\n{low}\n</THINK>\n{high}", 4),
    ("<thought>\n{low}\n</thought>\n{high}", 4),
    ("<reasoning>\n{low}\n</reasoning>\n{high}", 4),
    ("<reasoning>\n{low}\n</reasoning>\n<answer>\n{high}\n</answer>", 4),
    ("<think>\n{low}\n</think>\n<answer>{high}</answer>", 4),
    ("<seed:think>{low}</seed:think>{high}", 4),
    ("<thinking_process>{low}</thinking_process>{high}", 4),
    ("<analysis>\n{low}\n</analysis>\n\n{high}", 4),
    ("<think>{low}</ think >{high}", 4),
    ("◁think▷\n{low}\n◁/think▷\n{high}", 4),
    ("[THINK]\n{low}\n[/THINK]\n{high}", 4),
    ("<|begin_of_thought|>\n{low}\n<|end_of_thought|>\n<|begin_of_solution|>\n{high}\n<|end_of_solution|>", 4),
    ("<|START_THINKING|>{low}<|END_THINKING|><|START_RESPONSE|>{high}<|END_RESPONSE|>", 4),
    ("<|channel>thought\n{low}\n<channel|>{high}", 4),
    ("<think>a</think>\n{low}\n<think>b</think>\n{high}", 4),
    ("<think>\n<think>\n{low}\n</think>\n{high}", 4),
    ("<think>The <think>x</think> of the attempt.\n{low}\n</think>\n{high}", 4),
    ("<think>a</think><reasoning>{low}</reasoning>{high}", 4),
    # Which of two it is cannot be told: missing.
    ("<think>The attempt opens <think> and closes </think> and I go on.\n{high}", None),
    ("<think>\n{low}\n</thinking>\n{high}", None),
    ("<think>a</think>\n{low}\n<think>b\n{high}", None),
    ("The attempt never closes its <think> tag.\n{high}", None),
    # A tag in a code span is spoken of, not used.
    ("The attempt never closes its `<think>` tag.\n{high}", 4),
    ("{high}\nThe attempt ends with `</think>`.", 4),
    ("<think>\nIt ends with `</think>`.\n{high}", None),
    # What only looks like a thought.
    ("I think so.\n{high}", 4),
    ("Reasoning: sound.\n{high}", 4),
    ("[Reasoning] sound\n{high}", 4),
    ("if a <think and b> c\n{high}", 4),
    ("<thinker>\n{high}", 4),
    ("<think/>\n{high}", 4),
    # Channels, with control tokens and without them.
    ("<|channel|>analysis<|message|>{high}", None),
    ("<|channel|>analysis<|message|>a\n{high}\n<|end|>", None),
    ("<|channel|>analysis<|message|>{low}<|end|><|start|>assistant<|channel|>final<|message|>{high}", 4),
    ("<|channel|>analysis<|message|>{low}<|end|><|start|>assistant<|channel|>final<|message|>{high}<|return|>", 4),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>", None),
    ("<|channel|>commentary<|message|>{high}", None),
    ("<|channel|>final<|message|>Fine.\n{high}", 4),
    ("<|channel|>final<|message|>{low}<|end|><|start|>assistant<|channel|>analysis<|message|>{high}", None),
    ("analysisWe compare them.\n{low}\nassistantfinalNearly right.\n\n{high}", 4),
    ("analysisWe compare them.{low}assistantfinal{high}", 4),
    ("analysisWe compare them.\n{high}", None),
    ("Analysis: nearly right.\n{high}", 4),
    ("analysis\nnearly right\n{high}", 4),
    # The end of a turn, from a server that shows it.
    ("{high}<|im_end|>", 4),
    ("{high}</s>", 4),
    ("{high}<|eot_id|>\n", 4),
]

# (text; its score) with the number beside its label or on the next line
SCORES = [
    ("Score:\n4", 4),
    ("Score:\n\n4", 4),
    ("Score:\n \n\t4  ", 4),
    ("Score:\r\n4\r\n", 4),
    ("Analysis: it is right.\n\nScore:\n4\n", 4),
    ("Score: 2\nScore:\n4", 4),
    ("**Score**:\n\n**4**", 4),
    ("**Score:**\n4", 4),
    ("**Score:**\n\n**4/5**", 4),
    ("**Score**\n4", 4),
    ("__Score__\n4", 4),
    ("## Score\n4", 4),
    ("### Score:\n\n4", 4),
    ("### Final Score\n\n**4/5**", 4),
    ("### **Score**\n4", 4),
    ("Final score:\n4", 4),
    ("Score =\n4", 4),
    ("Score —\n4", 4),
    ("Score：\n4", 4),
    ("> Score:\n> 4", 4),
    ("- Score:\n  4", 4),
    ("Score:\n4.", 4),
    ("Score:\n`4`", 4),
    ("Score:\n[4]", 4),
    ("Score:\n4/5", 4),
    ("Score:\n4 out of 5", 4),
    ("Score:\n$\\boxed{4}$", 4),
    ("Score:\n4\n\nThat is because the attempt is right.", 4),
    ("Score:\n4\n\n(out of 5)", 4),
    ("Score:\nScore: 4", 4),
    ("Score: <b>4</b>", 4),
    ("Score: <strong>4</strong>/5", 4),
    ("<b>Score:</b> 4", 4),
    ("<strong>Score: 4</strong>", 4),
    ("<p>Score: 4</p>", 4),
    ("Score: 4<br>", 4),
    ("<b>Score</b>:<br>\n<b>4</b>", 4),
    ("<answer>Score: 4</answer>", 4),
    ("Score: 4 out of 5", 4),
    ("Score: 4 out of 5.", 4),
    ("Score: **4 out of 5**", 4),
    ("Score: **4** out of **5**", 4),
    ("Score: (4 out of 5)", 4),
    ("Score: 4 of 5", 4),
    ("Final score — 4", 4),
    ("Final Score - 4/5", 4),
    ("Final score – **4**", 4),
    ("Score: \\(4\\)", 4),
    ("Score: $\\mathbf{4}$", 4),
    ("Score: \\textbf{4}", 4),
    ("Score: 2\n\nOverall score: 4", 4),
    ("**Overall Score:** 4/5", 4),
    ("## Overall score\n\n**4**", 4),
    ("Score: 2\nOverall score: unclear", None),
    ("Score: 4\u200b", 4),
    ("Score:\n\ufeff4", 4),
    ("Score: ４", 4),
    ("Score: ④", None),
    # Another number, or more than one.
    ("Score: 4.5", None),
    ("Score: 45", None),
    ("Score:\n4.5", None),
    ("Score:\n45", None),
    ("Score:\n4,5", None),
    ("Score:\n4 5", None),
    ("Score:\n4\n5", None),
    ("Score:\n4\n\n5", None),
    ("Score:\n1\n2\n3\n4\n5", None),
    ("Score:\n4 or 5", None),
    ("Score:\n4-5", None),
    ("Score:\n-4", None),
    ("Score:\n- 4", None),
    ("Score:\n0", None),
    ("Score:\n6", None),
    ("Score:\n4/10", None),
    ("Score:\n4 out of 10", None),
    ("Score:\n4%", None),
    ("Score:\nfour", None),
    ("Score: 4 out of 10", None),
    ("Score: 4 out of 50", None),
    ("Score: 3-4 out of 5", None),
    ("Score: 4 out of 5 or 3 out of 5", None),
    ("Score: 4 out of", None),
    ("Score: <b>4</b>.5", None),
    ("Score: <b>4</b>5", None),
    ("Score: 4<br>5", None),
    ("Score: 4½", None),
    ("Score: ~4", None),
    ("Score: 4+", None),
    ("Score: N/A", None),
    # What follows the label is not the score alone.
    ("Score:", None),
    ("Score:\n", None),
    ("Score:\n\n\n", None),
    ("Score: 2\nScore:\n", None),
    ("Score: 2\n## Score\n", None),
    ("Score:\nThe attempt is right.\n4", None),
    ("Score:\n4 because it is right", None),
    ("Score:\n4: nearly right", None),
    ("Score:\n1. It is right.\n2. It is short.", None),
    ("Score:\n4. It is right.", None),
    ("Score:\n---\n4", None),
    ("Score: 2\n**Score**\n\nNearly right.", None),
    # No label.
    ("4", None),
    ("4/5", None),
    ("4 out of 5", None),
    ("\\boxed{4}", None),
    ("Score\n4", None),
    ("Scores:\n4", None),
    ("## Scores\n4", None),
    ("## Score of the attempt\n4", None),
    ("I would give it this score:\n4", None),
]


YES, NO, MISSING = Verdict.correct, Verdict.wrong, Verdict.missing
YES_OR_NO = [
    ("Verdict:\nyes", YES),
    ("Verdict:\n\nNo.", NO),
    ("**Verdict**:\n\n**yes**", YES),
    ("**Verdict:**\nNO", NO),
    ("**Verdict**\nyes", YES),
    ("## Verdict\n\nyes", YES),
    ("### Final verdict:\n**no**", NO),
    ("Final verdict — yes", YES),
    ("Verdict: <b>yes</b>", YES),
    ("<strong>Verdict:</strong> no", NO),
    ("Verdict: \\boxed{yes}", YES),
    ("Verdict: $\\text{no}$", NO),
    ("<answer>Verdict: yes</answer>", YES),
    ("Verdict: no\nVerdict:\nyes", YES),
    ("Verdict:\nno\n\nThe sign differs.", NO),
    ("Verdict:\nyes\nno", MISSING),
    ("Verdict:\nyes and no", MISSING),
    ("Verdict:\nyes, it agrees", MISSING),
    ("Verdict:\nnot sure", MISSING),
    ("Verdict:\nnone", MISSING),
    ("Verdict:\nThe sign differs.\nno", MISSING),
    ("Verdict: yes\nVerdict:\n", MISSING),
    ("Verdict: yes\n## Verdict\nunclear", MISSING),
    ("Verdict:\n<yes|no>", MISSING),
    ("Verdict: <b>yes</b>no", MISSING),
    ("Verdict: <b>y</b>es", MISSING),
    ("Verdict\nyes", MISSING),
    ("Verdicts:\nyes", MISSING),
    ("yes", MISSING),
]


@pytest.mark.parametrize("text, score", THOUGHTS)
def test_only_what_follows_a_thought_is_an_answer(text, score):
    assert parse_score(text.format(high=HIGH[0], low=LOW[0])) == score
    assert parse_verdict(text.format(high=HIGH[1], low=LOW[1])) == VERDICTS[score]


@pytest.mark.parametrize("text, score", SCORES)
def test_a_score_stands_alone_after_its_label(text, score):
    assert parse_score(text) == score


@pytest.mark.parametrize("text, verdict", YES_OR_NO)
def test_a_verdict_stands_alone_after_its_label(text, verdict):
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    "text, ends",
    [
        ("Nearly right.\nScore: 4", True),
        ("Nearly right.\n**Score: 4**\n \n", True),
        ("Score:\n4", True),
        ("</think>Score: 4", True),
        ("Score: 4\nBut wait, the last", False),
        ("Score: 4\nScore", False),
        ("Score:\n4\n\nBut", False),
        ("Score: 4\n<think>", False),
    ],
)
def test_at_the_end_of_a_cut_answer_or_not_at_all(text, ends):
    assert parse_score(text, at_end=True) == (4 if ends else None)
    assert parse_verdict(text.replace("Score", "Verdict").replace("4", "yes"), at_end=True) == (
        YES if ends else MISSING
    )


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet="<>/think|ganl_of\n `◁▷[]Score: 24", max_size=60))
def test_an_answer_is_the_end_of_the_text(text):
    assert text.endswith(answer_of(text))
    assert answer_of("<think>" + text.replace(">", "").replace("]", "").replace("▷", "")) == ""


@pytest.mark.parametrize(
    "prompt, opened",
    [
        ("Score: <1-5>\nassistant\n<think>\n", "<think>"),
        ("assistant: <think>", "<think>"),
        ("◁think▷", "◁think▷"),
        ("[THINK]\n", "[THINK]"),
        ("<|begin_of_thought|>\n\n", "<|begin_of_thought|>"),
        ("assistant\n<think>\n\n</think>\n\n", ""),
        ("<think>\nOkay", ""),
        ("assistant\n", ""),
        ("write `<think>`", ""),
        ("", ""),
    ],
)
def test_a_prompt_that_opens_a_thought_is_known(prompt, opened):
    assert opened_thought(prompt) == opened


@pytest.mark.parametrize(
    "text", ["`" * 50_000, "<" * 50_000, "<think " * 10_000, "[think\n" * 10_000, "Score:\n" * 10_000]
)
def test_a_long_answer_is_read_in_no_time(text):
    start = time.process_time()
    assert parse_score(text) is None
    assert time.process_time() - start < 2.0  # a quadratic reader takes minutes
