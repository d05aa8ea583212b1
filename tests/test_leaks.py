"""The policy never sees a reference or an answer: not in a prompt, not in any tokens its programs are given."""

import contextlib
import dataclasses
import io
import json
import types

import jax
import numpy as np
import pytest
from tiny_runs import ROOT, opened, read_jsonl, run, tiny, write_problems

from exprl_jax import programs
from exprl_jax.data.prompts import teacher_prompt
from exprl_jax.distill import open_distill_run
from exprl_jax.kinds import KINDS

REFERENCE, ANSWER = "canary-of-the-reference", "canary-of-the-answer"
VERIFIER = {f"routes.{kind}": "verifier" for kind in KINDS}
ARMS = {
    "outcome": ("outcome", {}),
    "process": ("process", {}),
    "sparse": ("outcome", VERIFIER),
    "stage two": ("outcome", VERIFIER | {"loss.kl_coef": 0.0, "rollout.max_resample": 1}),
    "likelihood": ("outcome", {f"routes.{kind}": "likelihood" for kind in KINDS} | {"loss.kl_coef": 0.0}),
    "hints": ("outcome", VERIFIER | {"loss.kl_coef": 0.0, "rollout.hints": 16, "data.max_prompt_tokens": 280}),
    "sampled": ("distill", {"distillation.kl": "sampled"}),
    "full": ("distill", {"distillation.kl": "full"}),
}
SPARSE, DISTILL = ("sparse", "stage two", "likelihood"), ("sampled", "full")


def recording(made, texts, shows):
    """The same programs, which keep the tokens of what they are given: `shows` says of which arguments, by name."""

    def recorded(program, arguments):
        def call(*given):
            for kept, places in arguments.items():
                for path, leaf in jax.tree_util.tree_leaves_with_path([given[place] for place in places]):
                    if getattr(path[-1], "name", "").startswith(("tokens", "target")):
                        texts.setdefault(kept, []).append(np.asarray(leaf).reshape(-1, leaf.shape[-1]))
            return program(*given)

        return call

    return dataclasses.replace(
        made, **{name: recorded(getattr(made, name), arguments) for name, arguments in shows.items()}
    )


# For each builder, the arguments of its programs that hold tokens, and under which name they are kept.  The first
# arguments are parameters or states; a teacher's program is given two prompts.
SHOWN = {
    "build": {"token_logp": {"token_logp": (1,)}, "train_step": {"train_step": (2,)}},
    "build_sampler": {"prefill": {"prefill": (1,)}, "sample": {"sample": (2,)}},
    # The one place where a policy's run shows references to a model beside the judge: the frozen writer of hints.
    "build_hint_sampler": {"prefill": {"hint_prefill": (1,)}, "sample": {"hint_sample": (2,)}},
    "build_judge": {"prefill": {"judge_prefill": (1,)}, "judge": {"judge": (2,)}, "branches": {"judge": (2,)}},
    "build_teacher": {
        "signal": {"teacher": (2,), "policy beside the teacher": (3,)},
        "distill_step": {"teacher": (3,), "policy beside the teacher": (4,)},
    },
}


@pytest.fixture(scope="module", params=ARMS)
def seen(request, tmp_path_factory):
    """What each program was given in a run whose problems carry canaries, as text; what the run said; its folder."""
    folder = tmp_path_factory.mktemp("leaks")
    lines = read_jsonl(ROOT / "configs/data/arithmetic.jsonl")
    problems = [problem | {"reference": f"{REFERENCE} {n}", "answer": ANSWER} for n, problem in enumerate(lines)]
    arm, changes = ARMS[request.param]
    source = {"data.source": write_problems(folder / "problems.jsonl", problems)}
    config = tiny(arm, source | {"log.rollouts": 32, "steps": 1} | changes)
    tokens, said = {}, io.StringIO()

    def watched(builder, shows):
        return lambda *arguments, **options: recording(builder(*arguments, **options), tokens, shows)

    with pytest.MonkeyPatch.context() as patch:
        for name, shows in SHOWN.items():
            patch.setattr(programs, name, watched(getattr(programs, name), shows))
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            run(config, folder / "run")
    made = opened(config)
    decode = made.policy.tokenizer.decode
    text = {name: "\n".join(decode(row.tolist()) for array in given for row in array) for name, given in tokens.items()}
    return types.SimpleNamespace(arm=request.param, text=text, run=made, folder=folder / "run", said=said.getvalue())


def test_no_program_of_the_policy_is_given_a_canary(seen):
    names = {"prefill", "sample", "train_step"}
    names |= {"token_logp"} if seen.run.config.task == "rl" and seen.run.config.loss.kl_coef > 0 else set()
    names |= {"policy beside the teacher"} if seen.arm in DISTILL else set()
    if seen.arm == "full":
        names -= {"train_step"}
    # Without a KL the log-prob program has one use: to weigh answers.
    others = {"judge_prefill", "judge", "teacher", *(["token_logp"] if seen.arm == "likelihood" else [])}
    others |= {"hint_prefill", "hint_sample"} if seen.arm == "hints" else set()
    assert names == set(seen.text) - others
    for name in names:
        assert seen.text[name] and "canary" not in seen.text[name], name
    for name in names - {"sample"}:
        assert "How many" in seen.text[name], name  # the recording works


def test_the_judge_is_given_the_reference_and_not_the_answer(seen):
    if seen.arm in ("outcome", "process"):
        assert REFERENCE in seen.text["judge_prefill"]
        assert ANSWER not in seen.text["judge_prefill"] and ANSWER not in seen.text["judge"]
    else:
        assert "judge_prefill" not in seen.text and "judge" not in seen.text


def test_the_pass_that_weighs_answers_is_given_the_answer_and_not_the_reference(seen):
    """And nothing else is, by the test above."""
    assert (ANSWER in seen.text.get("token_logp", "")) == (seen.arm == "likelihood")
    assert REFERENCE not in seen.text.get("token_logp", "")


def test_who_writes_hints_is_given_the_reference_and_not_the_answer_and_the_policy_its_words_alone(seen):
    assert ("hint_prefill" in seen.text) == (seen.arm == "hints")
    if seen.arm == "hints":
        assert REFERENCE in seen.text["hint_prefill"] and ANSWER not in seen.text["hint_prefill"]
        assert "Hint: " in seen.text["prefill"] and "Hint: " not in seen.text["hint_prefill"]


def test_the_teacher_is_given_the_reference_and_not_the_answer(seen):
    assert ("teacher" in seen.text) == (seen.arm in DISTILL)
    if seen.arm in DISTILL:
        batch = {sample["id"] for sample in read_jsonl(seen.folder / "rollouts" / "step_000001.jsonl")}
        for problem in seen.run.problems:
            assert (problem.reference in seen.text["teacher"].split("\n")) == (problem.id in batch)
        assert ANSWER not in seen.text["teacher"]


def test_no_prompt_of_the_policy_holds_a_canary(seen):
    made, references = seen.run, seen.arm not in SPARSE
    assert len(made.prompts.ids) == len(made.problems) == 64
    for problem in made.problems:
        prompt = made.policy.tokenizer.decode(made.prompts.ids[problem.id])
        assert problem.problem in prompt and "canary" not in prompt
        assert (problem.reference is not None) == references
        if seen.arm in ("outcome", "process"):
            assert problem.reference in made.judge.tokenizer.decode(made.judge.prompts.score[problem.id].head)
        if seen.arm in DISTILL:
            shown = made.policy.tokenizer.decode(teacher_prompt(made.policy.tokenizer, problem))
            assert problem.reference in shown and ANSWER not in shown


def test_sampled_rollouts_and_their_prompts_hold_no_canary(seen):
    """The fields `reference` and `answer` are there for people to read; what the policy read and wrote is elsewhere."""
    samples = read_jsonl(seen.folder / "rollouts" / "step_000001.jsonl")
    assert len(samples) == 32
    for sample in samples:
        assert ("canary" in json.dumps(sample["reference"])) == (seen.arm not in SPARSE)
        assert sample.pop("answer") == ANSWER
        del sample["reference"]
        assert "canary" not in json.dumps(sample) and sample["prompt"]


def test_where_references_are_not_read_no_trace_of_them_is_left(seen):
    """In no file of the run and in nothing that it said; where they are read, the start shows what of the first."""
    shown = [line.split()[0] for line in seen.said.splitlines() if REFERENCE in line]
    assert shown == ([] if seen.arm in SPARSE else ["reference"])
    files = [path for path in seen.folder.rglob("*") if path.is_file()]
    holding = {path.relative_to(seen.folder).parts[0] for path in files if REFERENCE.encode() in path.read_bytes()}
    assert len(files) > 10 and "step 1/1" in seen.said
    assert holding == (set() if seen.arm in SPARSE else {"report.html", "rollouts"})  # for people to read


def test_a_teacher_without_references_is_refused(tmp_path):
    bare = [{"problem": f"{n} + 1?", "answer": "1"} for n in range(8)]
    source = write_problems(tmp_path / "problems.jsonl", bare)
    config = tiny("distill", {"data.source": source})
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match="line 1: no reference; the row has problem"):
        open_distill_run(config, stack)
    # Sparse rewards need none.
    assert len(opened(tiny("outcome", VERIFIER | {"data.source": source})).problems) == 8
