"""The policy never sees a reference or an answer: not in a prompt, not in any tokens its programs are given."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import exprl_jax.train as loop
from exprl_jax import programs
from tiny_runs import ROOT, run, tiny

REFERENCE, ANSWER = "canary-of-the-reference", "canary-of-the-answer"


@pytest.fixture(scope="module", params=["outcome", "process"])
def seen(request, tmp_path_factory):
    """All token arrays that each program was given in a run whose problems carry canaries, by the program's name."""
    folder = tmp_path_factory.mktemp("leaks")
    lines = (ROOT / "configs/data/arithmetic.jsonl").read_text().splitlines()
    made = [json.loads(line) | {"reference": f"{REFERENCE} {n}", "answer": ANSWER} for n, line in enumerate(lines)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in made))
    config = tiny(request.param, {"data.source": str(folder / "problems.jsonl"), "log.rollouts": 32, "steps": 1})
    tokens, build = {field.name: [] for field in dataclasses.fields(programs.Programs)}, programs.build

    def recording(name, program):
        def recorded(first, *inputs):  # the first argument is parameters or the state
            whole = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
            tokens[name] += [leaf.reshape(-1, leaf.shape[-1]) for leaf in whole if leaf.dtype == np.int32 and leaf.ndim > 1]
            return program(first, *inputs)

        return recorded

    def build_recording(*arguments):
        made = build(*arguments)
        return dataclasses.replace(made, **{name: recording(name, getattr(made, name)) for name in tokens})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.programs_room, "build", build_recording)
        run(config, folder / "run")
    decode = loop.prepare(config).policy.tokenizer.decode
    text = {name: "\n".join(decode(row.tolist()) for array in arrays for row in array) for name, arrays in tokens.items()}
    return text, loop.prepare(config), folder / "run"


def test_no_program_of_the_policy_is_given_a_canary(seen):
    text, made, _ = seen
    for name in ("prefill", "sample", "token_logp", "train_step"):
        assert "canary" not in text[name], name
    assert "How many" in text["prefill"] and "How many" in text["train_step"]  # the recording works
    assert text["sample"] and text["token_logp"]


def test_the_judge_is_given_the_reference_and_not_the_answer(seen):
    text, _, _ = seen
    assert REFERENCE in text["judge_prefill"]
    assert ANSWER not in text["judge_prefill"] and ANSWER not in text["judge"]


def test_no_prompt_of_the_policy_holds_a_canary(seen):
    _, made, _ = seen
    assert len(made.prompts) == len(made.problems) == 64
    for problem in made.problems:
        prompt = made.policy.tokenizer.decode(made.prompts[problem.id])
        assert problem.problem in prompt and "canary" not in prompt
        assert problem.reference in made.judge.tokenizer.decode(made.judge.prompts[problem.id].head)


def test_sampled_rollouts_and_their_prompts_hold_no_canary(seen):
    _, _, folder = seen
    written = (folder / "rollouts" / "step_000001.jsonl").read_text()
    assert written.count('"prompt"') == 32
    assert "canary" not in written
