"""Training a judge: lessons are put to it as a run puts traces to it, and it learns to answer them."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import scipy.stats
from tiny_runs import ROOT, config_dict, parameters, rows, take_step

from exprl_jax import judge_training, programs, supervised_run
from exprl_jax.data.problems import Problem
from exprl_jax.data.tokenizer import SplitPrompt, load_tokenizer
from exprl_jax.learning import supervised
from exprl_jax.mesh import Placement, make_mesh
from exprl_jax.records import Rollouts
from exprl_jax.resolve import resolve
from exprl_jax.reward.judge import JudgePrograms, Query
from exprl_jax.reward.judge_prompts import CONTINUATION, blind_messages, digit_token_ids, parse_score
from exprl_jax.reward.judges import JudgeBuilder
from exprl_jax.reward.lessons import JudgeLesson, Label, lesson_prompt, read_lessons, teach
from exprl_jax.weights.language_model import load_params, open_model
from tests.oracles.tiny_decoder import forward_logits

LESSONS = str(ROOT / "configs/data/lessons.jsonl")
SHORT = {"lessons": LESSONS, "optimizer.eps": 1e-4, "optimizer.learning_rate": 5e-3, "optimizer.warmup": 0.0}
SHORT |= {"validation.every": 0, "validation.fraction": 0.0, "checkpoint.best": "", "judge.max_trace_tokens": 256}
TOKENIZER = load_tokenizer("byte")
DIGITS = digit_token_ids(TOKENIZER)
SUM = {"problem": "2 + 3?", "reference": "2 + 3 = 5"}


def tiny(changes=None):
    return resolve(config_dict("judge", "tiny", SHORT | (changes or {})))


def written(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def examples_of(run):
    """All that it trains on, in order."""
    return [example for branches in run.examples.branches for example in branches.examples]


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
        nothing, zeros = np.zeros((8, 1, 4), np.int32), np.zeros((8, 1, 4), np.float32)
        return jax.device_put(Rollouts(nothing, nothing > 0, zeros, zeros, np.ones((8, 1), bool)))

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
    (example,) = examples_of(judge_training.open_run(config))
    problem = Problem("x", SUM["problem"], SUM["reference"], "", "math")
    assert list(example.prompt) == asked_by_a_judge(config.judge, problem, unit, trace)
    if readout == "logits":
        assert example.response == (DIGITS[2],)
    else:
        assert TOKENIZER.decode(example.response) == "Score: 3"
        assert example.response[-1] == TOKENIZER.eos_ids[0] and TOKENIZER.eos_ids[0] not in example.response[:-1]


def test_without_a_reference_the_judge_is_asked_without_one(tmp_path):
    source = written(tmp_path / "one.jsonl", [SUM | {"reference": None, "trace": "5", "score": 1}])
    (example,) = examples_of(judge_training.open_run(tiny({"lessons": source, "batch": 1})))
    messages = blind_messages(SUM["problem"], (), "math", "logits", "TRACE")
    prompt = TOKENIZER.render_split(messages, "TRACE", CONTINUATION["logits"])
    assert list(example.prompt) == [*prompt.head, *prompt.tail("5")] and example.response == (DIGITS[4],)


@pytest.mark.parametrize(
    "score, digit, share", [(0, 1, 0), (0.25, 2, 0), (0.3, 2, 0.2), (0.99, 4, 0.96), (1, 5, 0), (0.5, 3, 0)]
)
def test_a_score_is_a_digit_and_a_share_of_the_next(score, digit, share, tmp_path):
    source = written(tmp_path / "one.jsonl", [SUM | {"trace": "5", "score": score}])
    run = judge_training.open_run(tiny({"lessons": source, "batch": 1}))
    assert examples_of(run)[0].response == (DIGITS[digit - 1],)
    assert run.examples.shares[0][0] == pytest.approx(share, abs=1e-6)


def test_a_judgement_is_taught_as_it_is_written():
    config = tiny({"judge.readout": "text", "judge.max_tokens": 96, "row_tokens": 2048})
    run = judge_training.open_run(config)
    assert len(run.examples.items) == len(read_lessons(LESSONS)) == 96
    for lesson, example in zip(run.examples.items, examples_of(run)):
        (label,) = lesson.labels
        assert TOKENIZER.decode(example.response) == label.judgement
        assert parse_score(label.judgement) == 1 + 4 * label.score


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
    params, longest = load_params(run.policy, run.mesh, run.config.seed), max(len(x.prompt) for x in examples_of(run))
    tokens = np.zeros((len(made), longest), np.int32)
    for into, example in zip(tokens, examples_of(run)):
        into[: len(example.prompt)] = example.prompt
    logits_NTV = jax.jit(lambda x: forward_logits(params, run.policy.arch, run.policy.execution, x))(tokens)
    expected = []
    for logits_TV, example, lesson in zip(np.asarray(logits_NTV, np.float64), examples_of(run), run.examples.items):
        logits = logits_TV[len(example.prompt) - 1]
        logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        weights = np.maximum(0, 1 - np.abs(np.arange(1, 6) - (1 + 4 * lesson.labels[0].score)))
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
    # A whole digit would be 0.05 off or more.
    assert (abs(before - 0.3) > 0.1).all() and (abs(after - 0.3) < 0.04).all(), (before, after)


# Several scores of one text.

WORDS = ["Two ", "and thr", "ee is ", "f\u00fcnf", ", so\n\n### ", "\\boxed{5}."]


def prefixes(seed=0, count=8):
    """Rows whose texts have 2 to 5 scored beginnings; where they are cut is no matter to the tokenizer."""
    random, made = np.random.default_rng(seed), []
    for n in range(count):
        texts = ["".join(random.choice(WORDS, random.integers(1, 5))) for _ in range(random.integers(2, 6))]
        scores = random.integers(0, 9, len(texts)) / 8
        segments = [{"text": text, "score": score} for text, score in zip(texts, scores.tolist())]
        if n % 3 == 0:
            segments.insert(1, {"text": "unscored ", "score": None})
        made.append({"problem": f"2 + {n}?", "reference": f"It is {n + 2}.", "segments": segments})
    return made


def one_by_one(made):
    """The same scores, each a lesson of its own."""
    rows = []
    for row in made:
        before = ""
        for segment in row["segments"]:
            before += segment["text"]
            alone = {"problem": row["problem"], "reference": row["reference"], "trace": before, "unit": "prefix"}
            rows += [] if segment["score"] is None else [alone | {"score": segment["score"]}]
    return rows


@pytest.mark.parametrize("readout", ["logits", pytest.param("text", marks=pytest.mark.slow)])
def test_beginnings_of_a_text_are_one_lesson_and_as_if_each_were_alone(readout, tmp_path):
    """The loss, the gradient's norm, and the tokens that are computed."""
    made = prefixes()
    if readout == "text":
        for segment in (x for row in made for x in row["segments"] if x["score"] is not None):
            segment["score"] = round(segment["score"] * 4) / 4
    alone = one_by_one(made)
    changes = {"judge.readout": readout, "row_tokens": 1536 if readout == "logits" else 4096, "judge.max_tokens": 16}
    results = []
    for name, lessons in (("whole", made), ("alone", alone)):
        source = written(tmp_path / f"{name}.jsonl", lessons)
        run = judge_training.open_run(tiny(changes | {"lessons": source, "batch": len(lessons)}))
        state = supervised_run.first_state(run)
        _, result = take_step(supervised_run, run, state, 0)
        results.append((run, result.row, result.tokens["train"]))
    (whole, got, tokens), (apart, expected, tokens_alone) = results
    assert len(whole.examples.items) == 8 and [list(x.prompt) for x in examples_of(whole)] == [
        list(x.prompt) for x in examples_of(apart)
    ]
    assert got["update/tokens"] == expected["update/tokens"] >= 20
    assert got["loss/total"] == pytest.approx(expected["loss/total"], abs=1e-5)
    assert got["grad/norm"] == pytest.approx(expected["grad/norm"], rel=1e-4)
    # The rubric and the problem alone are four fifths of a prompt here.
    assert tokens < 0.5 * tokens_alone


def test_what_is_shared_ends_where_the_ids_part():
    """A merge over the cut: `th` is one token where the text goes on, and ends in `t` where it is cut."""
    pieces = {"a": 1, "t": 2, "th": 3, "e": 4}

    def encode(text):
        ids = []
        while text:
            piece = max((x for x in pieces if text.startswith(x)), key=len)
            ids.append(pieces[piece])
            text = text.removeprefix(piece)
        return ids

    labels = tuple(Label(text, 0.5, None) for text in ("at", "athe", "a"))
    lesson = JudgeLesson("here", Problem("x", "?", "!", "", "math"), "prefix", labels)
    taught = teach(tiny().judge, TOKENIZER, SplitPrompt((7, 7), (9,), encode), DIGITS, lesson)
    assert [list(x.prompt) for x in taught.branches.examples] == [[7, 7, 1, 2, 9], [7, 7, 1, 3, 4, 9], [7, 7, 1, 9]]
    assert list(taught.branches.shared) == [3, 5, 3]


def test_a_lesson_that_is_longer_than_a_row_becomes_several(tmp_path):
    made = prefixes(count=4)
    source = written(tmp_path / "some.jsonl", made)
    whole = judge_training.open_run(tiny({"lessons": source, "batch": 4, "row_tokens": 2048}))
    room = max(len(x.prompt) for x in examples_of(whole)) + 40
    cut = judge_training.open_run(tiny({"lessons": source, "batch": 4, "row_tokens": room}))
    assert len(cut.examples.items) > 4 and all(x.tokens <= room for x in cut.examples.branches)
    assert [x.prompt for x in examples_of(cut)] == [x.prompt for x in examples_of(whole)]


def test_where_rows_cannot_share_each_score_has_a_prompt_of_its_own(tmp_path, monkeypatch):
    """The TPU's kernel tells segments apart, and no more."""
    source = written(tmp_path / "some.jsonl", prefixes())
    changes = {"lessons": source, "batch": 8, "row_tokens": 1536}
    (together,), _ = steps_of(judge_training.open_run(tiny(changes)), 1)
    monkeypatch.setattr(Placement, "shares_segments", False)
    (apart,), _ = steps_of(judge_training.open_run(tiny(changes)), 1)
    assert apart["loss/total"] == pytest.approx(together["loss/total"], abs=1e-5)
    assert apart["update/tokens"] == together["update/tokens"]


# Validation.


@pytest.mark.parametrize("readout", ["logits", pytest.param("text", marks=pytest.mark.slow)])
def test_a_validation_says_how_the_judge_ranks_what_was_held_back(readout, tmp_path):
    """Its scores are made anew, each asked for alone; the true ones are set against them."""
    source = written(tmp_path / "some.jsonl", [row | {"reference": "It is so."} for row in prefixes(count=24)])
    if readout == "text":
        rows_ = [x | {"score": round(4 * x["score"]) / 4} for x in one_by_one(read_rows_of(tmp_path / "some.jsonl"))]
        source = written(tmp_path / "text.jsonl", rows_)
    changes = {"lessons": source, "batch": 8, "steps": 1, "judge.readout": readout}
    changes["row_tokens"] = 1536 if readout == "logits" else 4096
    changes |= {"validation.every": 1, "validation.fraction": 0.4, "judge.max_tokens": 16}
    run = judge_training.open_run(tiny(changes))
    (row,), state = steps_of(run, 1)
    held = [(lesson, label) for lesson in run.held_back.items for label in lesson.labels]
    assert len({lesson.problem.problem for lesson, _ in held}) == 10
    if readout == "text":  # a judge that has not learned to write gives no score
        assert row["validation/parsed"] == 0 and row["validation/spearman"] is row["validation/misplaced"] is None
        return
    given = [expected_digit(run, state.params, lesson, label) for lesson, label in held]
    wanted = [1 + 4 * label.score for _, label in held]
    assert row["validation/parsed"] == 1
    assert row["validation/spearman"] == pytest.approx(scipy.stats.spearmanr(given, wanted)[0], abs=1e-6)
    says, right = np.array(given) >= 4, np.array(wanted) >= 4
    assert row["validation/misplaced"] == pytest.approx((says[~right].mean() + (~says[right]).mean()) / 2)


def read_rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def expected_digit(run, params, lesson, label):
    prompt = lesson_prompt(run.config.judge, TOKENIZER, lesson)
    ids = [*prompt.head, *prompt.tail(label.trace)]
    logits = plain_logits(run, params, ids)[list(DIGITS)]
    weight = np.exp(logits - logits.max())
    return weight @ np.arange(1, 6) / weight.sum()


def plain_logits(run, params, ids, width=1280):
    """Of the token after some, by the plain forward."""
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_forward(run.policy.arch, run.policy.execution)(params, tokens), np.float64)[0, len(ids) - 1]


@functools.cache
def _forward(arch, execution):
    return jax.jit(lambda params, tokens: forward_logits(params, arch, execution, tokens))


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
        ({"segments": [{"text": "5", "score": 1}], "unit": "outcome"}, "line 1: unit 'outcome' with segments"),
        ({"segments": [{"text": "5", "score": 1}], "score": 1}, "line 1: score beside segments, which hold"),
        ({"segments": [{"text": "5"}]}, "line 1: no segment has a score or a judgement"),
        ({"segments": [{"text": "5", "score": 2}]}, r"line 1: segment 1: score must be a number in \[0, 1\]"),
        ({"segments": [{"score": 1}]}, "line 1: segment 1: text must be a string, got None"),
        ({"segments": "5"}, "line 1: segments must be a list of objects with text and score, got '5'"),
    ],
)
def test_a_lesson_that_is_none_is_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_lessons(written(tmp_path / "bad.jsonl", [SUM | row]))


@pytest.mark.parametrize(
    "row, changes, message",
    [
        ({"score": 0.3}, {"judge.readout": "text"}, "the score 0.3 is no whole digit from 1 to 5"),
        ({"score": 1, "trace": "5" * 257}, {}, "no lesson is left of 1: 1 over config.judge.max_trace_tokens = 256"),
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
