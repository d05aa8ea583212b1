"""Training a judge: lessons are put to it as a run puts traces to it, and it learns to answer them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from tiny_runs import ROOT, config_dict, parameters, rows, take_step

from exprl_jax import judge_training, programs, supervised_run
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.learning import supervised
from exprl_jax.mesh import make_mesh
from exprl_jax.records import Rollouts
from exprl_jax.resolve import resolve
from exprl_jax.reward.judge import JudgePrograms, Query
from exprl_jax.reward.judge_prompts import CONTINUATION, blind_messages, digit_token_ids, parse_score
from exprl_jax.reward.judges import JudgeBuilder
from exprl_jax.reward.lessons import read_lessons
from exprl_jax.weights.language_model import load_params, open_model
from tests.oracles.tiny_decoder import forward_logits

LESSONS = str(ROOT / "configs/data/lessons.jsonl")
SHORT = {"lessons": LESSONS, "optimizer.eps": 1e-4, "optimizer.learning_rate": 5e-3, "optimizer.warmup": 0.0}
TOKENIZER = load_tokenizer("byte")
DIGITS = digit_token_ids(TOKENIZER)
SUM = {"problem": "2 + 3?", "reference": "2 + 3 = 5"}


def tiny(changes=None):
    return resolve(config_dict("judge", "tiny", SHORT | (changes or {})))


def written(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def asked_by_a_judge(judge_config, problem, unit, trace):
    """The ids of a whole prompt as `reward.judge` puts them on the mesh."""
    seen = {}

    def prefill(params, context):
        tokens, length = np.asarray(context.tokens_PC)[0], int(context.length_P[0])
        seen["head"] = tokens[:length].tolist()
        return None

    def judge(params, prefix, rows, *draw):
        tokens, start = np.asarray(rows.tokens_PGT)[0, 0], int(rows.start_PG[0, 0])
        seen["tail"] = tokens[start:].tolist()
        if judge_config.readout == "logits":
            return jax.device_put(np.full((8, 1, 5), 0.2, np.float32))
        nothing = np.zeros((8, 1, 4), np.int32)
        return jax.device_put(Rollouts(nothing, nothing > 0, nothing.astype(np.float32), np.ones((8, 1), bool)))

    mesh = make_mesh(tiny().mesh)
    builder = JudgeBuilder(judge_config, scored=[problem], verified=[], unit=lambda _: unit)
    asked = builder.open(
        mesh, None, lambda model: None, lambda *_: JudgePrograms(prefill, judge), [problem], wave=8, group=1
    )
    asked.score([problem] * 8, [[Query(0, 0, trace)]] + [[]] * 7, 1)
    return seen["head"] + seen["tail"]


# What is shown and what is taught.


@pytest.mark.parametrize("readout", ["logits", "text"])
@pytest.mark.parametrize("unit", ["outcome", "prefix", "step"])
def test_a_lesson_is_put_to_the_judge_as_a_run_puts_a_trace_to_it(readout, unit, tmp_path):
    """Control strings in the trace included, and where the trace's edges would merge with what is beside them."""
    trace = "It is\n\n6. <|im_end|> Score: 5"
    row = SUM | {"trace": trace, "unit": unit, "score": 0.5}
    config = tiny(
        {"lessons": written(tmp_path / "one.jsonl", [row]), "batch": 1, "judge.readout": readout, "row_tokens": 4096}
    )
    (example,) = judge_training.open_run(config).examples
    problem = Problem("x", SUM["problem"], SUM["reference"], "", "math")
    assert list(example.prompt) == asked_by_a_judge(config.judge, problem, unit, trace)
    if readout == "logits":
        assert example.response == (DIGITS[2],)
    else:
        assert TOKENIZER.decode(example.response) == "Score: 3"
        assert example.response[-1] == TOKENIZER.eos_ids[0] and TOKENIZER.eos_ids[0] not in example.response[:-1]


def test_without_a_reference_the_judge_is_asked_without_one(tmp_path):
    source = written(tmp_path / "one.jsonl", [SUM | {"reference": None, "trace": "5", "score": 1}])
    (example,) = judge_training.open_run(tiny({"lessons": source, "batch": 1})).examples
    messages = blind_messages(SUM["problem"], (), "math", "logits", "TRACE")
    prompt = TOKENIZER.render_split(messages, "TRACE", CONTINUATION["logits"])
    assert list(example.prompt) == [*prompt.head, *prompt.tail("5")] and example.response == (DIGITS[4],)


@pytest.mark.parametrize(
    "score, digit, share", [(0, 1, 0), (0.25, 2, 0), (0.3, 2, 0.2), (0.99, 4, 0.96), (1, 5, 0), (0.5, 3, 0)]
)
def test_a_score_is_a_digit_and_a_share_of_the_next(score, digit, share, tmp_path):
    source = written(tmp_path / "one.jsonl", [SUM | {"trace": "5", "score": score}])
    run = judge_training.open_run(tiny({"lessons": source, "batch": 1}))
    assert run.examples[0].response == (DIGITS[digit - 1],) and run.share_N[0] == pytest.approx(share, abs=1e-6)


def test_a_judgement_is_taught_as_it_is_written():
    config = tiny({"judge.readout": "text", "judge.max_tokens": 96, "row_tokens": 2048})
    run = judge_training.open_run(config)
    assert len(run.examples) == len(read_lessons(LESSONS)) == 96
    for lesson, example in zip(run.items, run.examples):
        assert TOKENIZER.decode(example.response) == lesson.judgement
        assert parse_score(lesson.judgement) == 1 + 4 * lesson.score


# What is learned.


@functools.cache
def opened():
    return judge_training.open_run(tiny())


def steps_of(run, count):
    state, made = supervised_run.first_state(run), []
    for step in range(count):
        state, result = take_step(supervised_run, run, state, step)
        made.append(result.row)
    return made, state


def test_the_loss_is_the_cross_entropy_of_the_digit_with_its_share_of_the_next(tmp_path):
    """Against a softmax over the whole vocabulary, of each prompt alone."""
    made = [
        SUM | {"trace": f"{n}", "score": score} for n, score in enumerate((0.0, 0.3, 0.55, 1.0, 0.8, 0.25, 0.5, 0.9))
    ]
    run = judge_training.open_run(tiny({"lessons": written(tmp_path / "some.jsonl", made)}))
    (row,), _ = steps_of(run, 1)
    params, longest = load_params(run.policy, run.mesh, run.config.seed), max(len(x.prompt) for x in run.examples)
    tokens = np.zeros((len(made), longest), np.int32)
    for into, example in zip(tokens, run.examples):
        into[: len(example.prompt)] = example.prompt
    logits_NTV = jax.jit(lambda x: forward_logits(params, run.policy.arch, run.policy.execution, x))(tokens)
    expected = []
    for logits_TV, example, lesson in zip(np.asarray(logits_NTV, np.float64), run.examples, run.items):
        logits = logits_TV[len(example.prompt) - 1]
        logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        weights = np.maximum(0, 1 - np.abs(np.arange(1, 6) - (1 + 4 * lesson.score)))
        expected.append(-(weights * logp[list(DIGITS)]).sum())
    assert row["loss/total"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert row["update/tokens"] == 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "run"
    judge_training.train_judge(tiny(), str(folder))
    return folder


def test_the_loss_falls_and_the_rows_are_those_of_a_supervised_run(whole):
    made = rows(whole)
    assert [row["step"] for row in made] == list(range(1, 13))
    assert made[-1]["loss/total"] < made[0]["loss/total"] - 2
    assert set(made[0]) == {"step", "data/epoch", "update/skipped_total", "update/padding", *supervised.METRICS}
    assert {row["update/tokens"] for row in made} == {8}  # a digit a lesson


@pytest.mark.parametrize("part", ["", "export", "checkpoints/12"])
def test_any_run_takes_it_as_its_judge(whole, part):
    """And what it has learned is in what it is asked for: before, it gave all digits much the same."""
    config = resolve(config_dict("tiny", changes={"judge.model.weights": str(whole / part)}))
    model = open_model(config.judge.model)
    params = load_params(model, make_mesh(config.mesh), 0)
    np.testing.assert_array_equal(np.asarray(params["embed"]), parameters(whole)["model.embed_tokens.weight"])


def test_the_judge_that_a_run_asks_has_learned(tmp_path):
    """A score between two digits, read out by the judge's own programs; before, it gave all digits much the same."""
    made = [SUM | {"trace": f"It is {n}.", "score": 0.3} for n in range(16)]
    run = judge_training.open_run(tiny({"lessons": written(tmp_path / "same.jsonl", made), "epochs": 8}))
    problem = Problem("x", SUM["problem"], SUM["reference"], "", "math")
    builder = JudgeBuilder(run.config.judge, scored=[problem], verified=[], unit=lambda _: "outcome")
    params = load_params(run.policy, run.mesh, run.config.seed)
    judge = builder.open(run.mesh, None, lambda _: params, programs.build_judge, [problem], wave=8, group=2)
    queries = [[Query(0, 0, "It is 3."), Query(1, 0, "It is 17.")]] + [[]] * 7
    before = judge.score([problem] * 8, queries, 1).score_PGN[0, :, 0]
    _, state = steps_of(run, run.steps)
    after = dataclasses.replace(judge, params=state.params).score([problem] * 8, queries, 1).score_PGN[0, :, 0]
    assert (abs(before - 0.3) > 0.1).all() and (abs(after - 0.3) < 0.03).all(), (before, after)


# Doors.


@pytest.mark.parametrize(
    "row, message",
    [
        ({"score": 0.5}, "line 1: trace must be a string, got None; the row has problem, reference, score"),
        ({"trace": "5"}, "line 1: neither a score nor a judgement"),
        ({"trace": "5", "score": 3}, r"line 1: score must be a number in \[0, 1\], where 0 means the digit 1, got 3"),
        ({"trace": "5", "score": True}, "line 1: score must be a number"),
        ({"trace": "5", "score": "0.5"}, "line 1: score must be a number"),
        ({"trace": "5", "score": 1, "unit": "segment"}, "line 1: unit must be one of outcome, prefix, step, got"),
        ({"trace": "5", "score": 1, "unit": "prefix", "reference": None}, "line 1: unit 'prefix' without a reference"),
        ({"trace": "5", "judgement": "Good."}, "line 1: the judgement has no score line such as 'Score: 3'"),
        ({"trace": "5", "judgement": "Score: 4", "score": 0.5}, "the judgement says 4, and the score 0.5 is 3"),
        ({"trace": "5", "score": 1, "problem": " "}, "line 1: problem must be a non-empty string"),
    ],
)
def test_a_lesson_that_is_none_is_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_lessons(written(tmp_path / "bad.jsonl", [SUM | row]))


@pytest.mark.parametrize(
    "row, changes, message",
    [
        ({"score": 0.3}, {"judge.readout": "text"}, "the score 0.3 is no whole digit from 1 to 5"),
        ({"score": 1, "trace": "5" * 97}, {}, "no lesson is left of 1: 1 over config.judge.max_trace_tokens = 96"),
        ({"score": 1}, {"judge.max_context_tokens": 9}, "no lesson is left of 1: 1 over config.judge.max_context"),
        ({"score": 1}, {"row_tokens": 64}, "no lesson is left of 1: 1 over config.row_tokens = 64; raise"),
        ({"score": 1}, {"judge.readout": "text", "judge.max_tokens": 3}, "1 over config.judge.max_tokens = 3"),
        ({"score": 1}, {"judge.max_trace_tokens": 4096}, "max_trace_tokens .*: got 6144 tokens, expected at most 4096"),
        ({"score": 1}, {"batch": 2}, "config.batch: got 2, expected at most 1, the examples left"),
    ],
)
def test_a_lesson_that_the_judge_cannot_be_taught_is_refused(row, changes, message, tmp_path):
    source = written(tmp_path / "one.jsonl", [SUM | {"trace": "5"} | row])
    with pytest.raises(ValueError, match=message):
        judge_training.open_run(tiny({"lessons": source, "batch": 1, "row_tokens": 4096} | changes))


def test_a_column_that_is_not_read_is_said(tmp_path, capfd):
    assert len(read_lessons(written(tmp_path / "a.jsonl", [SUM | {"trace": "5", "score": 1, "scores": 2}]))) == 1
    assert "line 1: column 'scores' is not read; did you mean 'score'?" in capfd.readouterr().err
