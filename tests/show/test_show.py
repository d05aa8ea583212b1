"""`--show`: what it shows is what a run does, of every task, and nothing is left behind."""

import json

import numpy as np
import pytest
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import LONG, ROOT, config_dict, read_jsonl, rows, run, tiny, write_problems

from exprl_jax.config import TASKS
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.evaluation.behaviour import FIELDS
from exprl_jax.evaluation.calibrate import calibrate
from exprl_jax.evaluation.evaluate import evaluate
from exprl_jax.kinds import KINDS
from exprl_jax.resolve import resolve
from exprl_jax.show.page import page_lines
from exprl_jax.show.questions import written
from exprl_jax.show.show import RECORDS, show
from exprl_jax.show.terminal import Paper, columns

OF_A_RUN = ("rollout", "response", "length", "ended", "verdict")


def records(config, count=1):
    return list(RECORDS[config.task](config, count))


def page(record, width=100):
    """The page without colours, which is within its width."""
    lines = page_lines(record, 1, 1, Paper(width, False))
    assert all(columns(line) <= width and "\x1b" not in line for line in lines)
    return "\n".join(lines)


def check_reference(record, text):
    """Wherever the reference stands, each of its lines has the bar; and it stands in no prompt of the policy."""
    shown = [line for line in text.splitlines() if record["reference"].splitlines()[0] in line]
    assert shown and all(line.startswith("┃ ") for line in shown)
    assert record["reference"] not in record["policy"]["prompt"]


@pytest.mark.parametrize(
    "arm, changes",
    [
        # A wave holds more problems than are shown, and groups without an advantage are sampled again.
        ("process", {"rollout.wave": 8, "rollout.max_resample": 1}),
        ("text", {"judge.max_tokens": 16}),
    ],
)
def test_what_is_shown_is_the_first_step_of_a_run(arm, changes, tmp_path):
    config = tiny(arm, LONG | {"steps": 1} | changes)
    logged = read_jsonl(run(config, tmp_path / "run") / "rollouts" / "step_000001.jsonl")
    assert len(logged) == config.rollout.prompts * config.rollout.group == 32
    shown = records(config, 2)
    assert [record["id"] for record in shown] == [row["id"] for row in logged[:2]]
    for record in shown:
        of_run = [row for row in logged if row["id"] == record["id"]]
        for row, rollout in zip(of_run, record["rollouts"], strict=True):
            assert {name: row[name] for name in OF_A_RUN} == {name: rollout[name] for name in OF_A_RUN}
            for ours, theirs in zip(rollout["segments"], row["segments"], strict=True):
                assert theirs.items() <= ours.items()
                likely = ours["digits"] and (np.dot(ours["digits"], [1, 2, 3, 4, 5]) - 1) / 4
                assert likely is None or likely == pytest.approx(ours["score"], abs=1e-6)
            ends = [0, *(end for _, end in (segment["tokens"] for segment in rollout["segments"]))]
            assert ends[-1] == rollout["length"] and sorted(set(ends)) == ends
        assert {name: of_run[0][name] for name in ("problem", "reference", "answer", "kind")}.items() <= record.items()
        text = page(record)
        check_reference(record, text)
        assert "warning" not in text and all(f"! {line[:30]}" in text for line in record["warnings"])
    segments = [segment for record in shown for rollout in record["rollouts"] for segment in rollout["segments"]]
    if arm == "process":
        assert any(segment["digits"] for segment in segments)
        assert any("P(1)" in page(record, 140) for record in shown)
    else:
        assert not any(segment["digits"] for segment in segments)
        # Untrained weights write no score, and it is said.
        assert any("scores were not given" in line for record in shown for line in record["warnings"])


def test_an_endpoint_is_shown_what_it_was_sent():
    changes = LONG | {"judge.backend": "openai", "judge.readout": "text", "judge.endpoint.model": "stub"}
    changes |= {"judge.endpoint.api_key_variable": "", "advantage.overlong": "keep"}
    with StubEndpoint(lambda seen, count: Answer(f"Half.\nScore: {2 + len(seen.content) % 3}")) as stub:
        (record,) = records(tiny("outcome", changes | {"judge.endpoint.base_url": stub.base_url}))
        question = record["judge"]["question"]
        sent = [seen.content for seen in stub.seen]
    whole = question["before"] + question["text"] + question["after"]
    assert whole.partition("[user]\n")[2] in sent
    assert question["text"] == record["rollouts"][record["shown"]]["response"]
    text = page(record)
    check_reference(record, text)
    assert "judge's words about segment 0" in text and "Score: " in text
    assert record["judge"] | {"question": None} == {
        **{"backend": "openai", "model": "stub", "readout": "text", "asks": "outcome", "segment": 0, "question": None}
    }


def test_open_ended_answers_have_the_question_that_decides(tmp_path):
    rows = [{"id": f"s{n}", "problem": f"Why {n}?", "answer": "gravity", "domain": "science"} for n in range(8)]
    routes = {f"routes.{kind}": "verifier" for kind in KINDS}
    changes = routes | {"data.source": write_problems(tmp_path / "problems.jsonl", rows), "loss.kl_coef": 0.0}
    changes |= {"judge.backend": "openai", "judge.readout": "text", "judge.endpoint.model": "stub"}
    changes |= {"judge.endpoint.api_key_variable": ""}
    with StubEndpoint(lambda seen, count: Answer("The same.\nVerdict: yes")) as stub:
        (record,) = records(tiny("outcome", LONG | changes | {"judge.endpoint.base_url": stub.base_url}))
        sent = [seen.content for seen in stub.seen]
    question = record["judge"]["question"]
    assert (question["before"] + question["text"] + question["after"]).partition("[user]\n")[2] in sent
    assert record["judge"]["asks"] == "verdict" and "gravity" in question["before"] + question["after"]
    assert {rollout["verdict"] for rollout in record["rollouts"]} == {"correct"} and record["reference"] is None
    assert "judge's prompt" in page(record)


def test_a_teachers_logratio_is_what_the_policy_is_moved_by(tmp_path):
    """−mean over the tokens of a step is the run's KL estimate; teacher and policy start as one model, and differ by
    their prompts alone."""
    config = tiny("distill", {"steps": 1, "distillation.kl": "sampled"})
    (row,) = rows(run(config, tmp_path / "run"))
    shown = records(config, config.rollout.prompts)
    ratios = [ratio for record in shown for rollout in record["rollouts"] for ratio in rollout["logratio"]]
    assert -np.mean(ratios) == pytest.approx(row["distill/kl"], abs=1e-5)
    for record in shown:
        assert record["reference"] in record["teacher"]["prompt"] and record["warnings"]
        for rollout in record["rollouts"]:
            assert len(rollout["pieces"]) == len(rollout["logratio"]) == rollout["length"]
        check_reference(record, page(record))


def test_an_example_is_the_prompt_and_the_reference_token_by_token():
    config = resolve(config_dict("tiny", "sft", {"data.source": str(ROOT / "configs/data/arithmetic.jsonl")}))
    for record in records(config, 2):
        assert "".join(record["target_pieces"]) == record["reference"] + "<|end|>"
        assert "".join(record["prompt_pieces"]) == record["policy"]["prompt"]
        assert record["target_tokens"] == len(record["target_pieces"]) and record["warnings"] == []
        text = page(record)
        assert "|".join(record["target_pieces"][:5]) in text and text.endswith("nothing looks off")


def test_a_judges_lesson_is_its_prompt_and_its_answer(tmp_path):
    lesson = {"problem": "2 + 3?", "reference": "2 + 3 = 5", "trace": "It is 6.", "unit": "prefix", "score": 0.3}
    source = write_problems(tmp_path / "lessons.jsonl", [lesson | {"trace": f"It is {n}."} for n in range(8)])
    config = resolve(config_dict("judge", "tiny", {"lessons": source, "judge.readout": "logits", "batch": 8}))
    (record,) = records(config)
    # 1 + 4 · 0.3 = 2.2: four fifths of the digit 2.
    (label,) = record["labels"]
    assert label["target_pieces"] == ["2"] and label["share"] == pytest.approx(0.2)
    question = record["judge"]["question"]
    assert question["text"].startswith("It is ") and question["after"].endswith("Score: ")
    assert "2 + 3 = 5" in question["before"] and "0.80 of it, and 0.20 of the next digit" in page(record)
    hidden = [line for line in page(record).splitlines() if "2 + 3 = 5" in line]
    assert len(hidden) == 2 and all(line.startswith("┃ ") for line in hidden)


@pytest.mark.parametrize("readout", ["logits", "text"])
def test_all_scores_of_a_lesson_are_shown(tmp_path, readout):
    segments = [{"text": f" Line {n}.", "score": n / 4, "judgement": f"Fine.\nScore: {n + 1}"} for n in range(3)]
    segments.insert(2, {"text": " Unscored."})
    lesson = {"problem": "2 + 3?", "reference": "2 + 3 = 5", "segments": segments}
    source = write_problems(tmp_path / "lessons.jsonl", [lesson] * 8)
    config = resolve(config_dict("judge", "tiny", {"lessons": source, "judge.readout": readout, "row_tokens": 4096}))
    (record,) = records(config)
    assert [label["text"] for label in record["labels"]] == [" Line 0.", " Line 1.", " Unscored. Line 2."]
    assert [label["score"] for label in record["labels"]] == [0, 0.25, 0.5]
    for n, label in enumerate(record["labels"], 1):
        answer = str(n) if readout == "logits" else f"Fine.\nScore: {n}<|end|>"
        assert "".join(label["target_pieces"]) == answer and label["target_tokens"] == len(label["target_pieces"])
    assert record["judge"]["question"]["text"] == " Line 0. Line 1. Unscored. Line 2."
    text = page(record)
    assert all(f"answer to learn of part {n} " in text for n in range(3)) and "judge's prompt about part 2" in text


def few_problems(tmp_path):
    lines = read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:8]
    return write_problems(tmp_path / "problems.jsonl", lines)


def test_samples_are_those_of_an_evaluation(tmp_path):
    changes = {"data.source": few_problems(tmp_path), "sampling.samples": 4}
    config = resolve(config_dict("evaluate", "tiny", changes))
    evaluate(config, str(tmp_path / "run"))
    sampled = read_jsonl(tmp_path / "run" / "samples" / "problems.jsonl")
    for record in records(config, 3):
        of_run = [row for row in sampled if row["id"] == record["id"]]
        assert len(of_run) == 4
        for row, rollout in zip(of_run, record["rollouts"], strict=True):
            assert row["sample"] == rollout["rollout"]
            assert {name: row[name] for name in OF_A_RUN[1:]} == {name: rollout[name] for name in OF_A_RUN[1:]}
        assert "of 4 correct" in page(record)


@pytest.mark.parametrize("task", ["evaluate", "verifier", "outcome"])
def test_what_a_judge_says_of_open_ended_answers_is_shown(task, tmp_path):
    """Its words, from which a run takes the verdict alone; each response is asked about once."""
    why = [dict(problem=f"Why {n}?", reference="By law.", answer="gravity", domain="science") for n in range(8)]
    changes = {"data.source": write_problems(tmp_path / "why.jsonl", why), "judge.backend": "openai"}
    changes |= {"judge.readout": "text", "judge.endpoint.model": "stub", "judge.endpoint.api_key_variable": ""}

    def answer(seen, count):
        if "Verdict: <yes|no>" not in seen.content:
            return Answer("Score: 3")
        right = len(seen.content) % 2
        return Answer(f"It has {len(seen.content)} letters.\nVerdict: {'yes' if right else 'no'}")

    with StubEndpoint(answer) as stub:
        changes["judge.endpoint.base_url"] = stub.base_url
        if task == "evaluate":
            config = resolve(config_dict("evaluate", "tiny", changes | {"sampling.samples": 4}))
        else:
            changes |= LONG | {"routes.science": task, "advantage.overlong": "keep"}
            config = tiny("outcome", changes)
        (record,) = records(config)
        asked = [seen.content for seen in stub.seen if "Verdict: <yes|no>" in seen.content]
    assert record["judge"]["asks"] == ("outcome" if task == "outcome" else "verdict")
    assert len(asked) == len(record["rollouts"]) == 4
    for rollout, said in zip(record["rollouts"], record["judge"]["said"], strict=True):
        (content,) = [content for content in asked if f"Response:\n{rollout['response']}\n" in content]
        assert said["text"].startswith(f"It has {len(content)} letters.")
        assert rollout["verdict"] == ("correct" if said["text"].endswith("yes") else "wrong")
    assert record["judge"]["said"][record["shown"]]["text"].splitlines()[0] in page(record, 120)


def fixed(tmp_path):
    """Rollouts as a run writes them, of eight problems."""
    lines = read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:8]
    made = [
        line
        | {"kind": "math", "domain": "math", "id": f"p{n}", "response": f"It is {n}.\n\nSo {n}.", "verdict": verdict}
        for n, line in enumerate(lines)
        for verdict in ("wrong", "correct")
    ]
    return write_problems(tmp_path / "step_000001.jsonl", made)


def test_a_calibrations_scores_are_those_that_it_writes(tmp_path):
    changes = {"rollouts": fixed(tmp_path), "data.source": "", "repeats.rollouts": 0, "prefixes.rollouts": 0}
    made = config_dict("calibrate", "tiny", changes).copy_and_resolve_references()
    made.unlock()
    del made.judges["text"]
    config = resolve(made)
    calibrate(config, str(tmp_path / "run"))
    asked = ("id", "rollout", "condition", "order")
    answered = {tuple(row[name] for name in asked): row for row in read_jsonl(tmp_path / "run" / "scores.jsonl")}
    for record in records(config, 2):
        (judge,) = record["judges"]
        names = [answer["pass"] for answer in judge["answers"]]
        assert names == ["correct", "none", "wrong", "reference_last"]
        for answer in judge["answers"]:
            condition = "correct" if answer["pass"] == "reference_last" else answer["pass"]
            order = answer["pass"] if answer["pass"] == "reference_last" else "trace_last"
            row = answered[record["id"], record["rollout"], condition, order]
            # Widths are of the shown prompts alone.
            assert answer["score"] == pytest.approx(row["score"], abs=1e-6)
            assert answer["digits"] == pytest.approx(row["digits"], abs=1e-6)
            holds = record["reference"] in answer["question"]["before"] + answer["question"]["after"]
            assert holds == (condition == "correct") and answer["question"]["text"] == record["response"]
        assert "reference_last" in page(record)


def test_an_annotation_shows_what_was_asked_and_read(tmp_path):
    fields = json.dumps(dict.fromkeys(FIELDS, 0) | {"counting": 1})
    changes = {"rollouts": fixed(tmp_path), "annotator.backend": "openai", "annotator.endpoint.model": "stub"}
    changes |= {"annotator.endpoint.api_key_variable": "", "wave": 8}
    with StubEndpoint(lambda seen, count: Answer(fields if "It is 0." in seen.content else "I cannot.")) as stub:
        config = resolve(config_dict("annotate", "tiny", changes | {"annotator.endpoint.base_url": stub.base_url}))
        read, unread = records(config, 2)
        sent = [seen.content for seen in stub.seen]
    question = read["annotator"]["question"]
    assert (question["before"] + question["text"] + question["after"]).partition("[user]\n")[2] in sent
    assert read["annotator"]["fields"]["counting"] == 1 and read["warnings"] == [] and "counting 1" in page(read)
    assert unread["annotator"]["fields"] is None and "not the JSON object" in unread["warnings"][0]


def test_every_task_can_be_shown():
    assert RECORDS.keys() == TASKS.keys()


def test_a_label_shows_what_each_part_of_a_rollout_is_worth(tmp_path):
    changes = {"rollouts": fixed(tmp_path), "data.source": "", "segments.rule": "paragraph", "judge.backend": "openai"}
    changes |= {"judge.readout": "text", "judge.endpoint.model": "stub", "judge.endpoint.api_key_variable": ""}
    told = lambda seen, count: Answer("Fine.\nScore: 4" if "So " in seen.content else "Nothing yet.")  # noqa: E731
    with StubEndpoint(told) as stub:
        config = resolve(config_dict("label", "tiny", changes | {"judge.endpoint.base_url": stub.base_url}))
        records_of, sent = records(config, 2), [seen.content for seen in stub.seen]
    for record in records_of:
        assert "".join(segment["text"] for segment in record["segments"]) == record["response"]
        assert [segment["score"] for segment in record["segments"]] == [None, 0.75]
        assert [segment["judge"] for segment in record["segments"]] == ["Nothing yet.", "Fine.\nScore: 4"]
        question = record["judge"]["question"]
        assert (question["before"] + question["text"] + question["after"]).partition("[user]\n")[2] in sent
        assert record["warnings"] == ["1 of 2 scores were not given"] and "labels" in page(record)


@pytest.mark.parametrize(
    "name, arm, changes, message",
    [
        ("tiny", "outcome", {}, "--show: got 9 problems, expected at most 8, config.rollout.prompts"),
        ("tiny", "sft", {}, "--show: got 9 problems, expected at most 8, config.batch"),
        ("annotate", "tiny", {"rollouts": "rows"}, "--show: got 9 problems, expected at most 8, those of the rollouts"),
    ],
)
def test_more_than_there_is_is_refused(name, arm, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    changes = {key: fixed(tmp_path) for key in changes}
    with pytest.raises(ValueError, match=message):
        records(resolve(config_dict(name, arm, changes)), 9)


def test_json_is_a_line_a_problem_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    config = resolve(config_dict("tiny", "sft", {"data.source": str(ROOT / "configs/data/arithmetic.jsonl")}))
    monkeypatch.chdir(tmp_path)
    show(config, 2, as_json=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records(config, 2)
    show(config, 1, as_json=False)
    printed = capsys.readouterr().out
    assert printed.startswith("━━ problem 1 of 1 ") and "\x1b" not in printed and not list(tmp_path.iterdir())


def test_control_tokens_are_shown_by_name():
    tokenizer = load_tokenizer("byte")
    ids = [*tokenizer.encode("zwölf\n"), tokenizer.eos_ids[0]]
    assert tokenizer.spell(ids) == ["z", "w", "\\xc3", "\\xb6", "l", "f", "\n", "<|end|>"]
    assert written(tokenizer, ids) == "zwölf\n<|end|>" and tokenizer.decode(ids) == "zwölf\n"
