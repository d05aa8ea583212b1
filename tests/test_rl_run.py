"""What a run opens before its first step: what it shares, what it has no need of, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import PROBLEMS, ROOT, opened, read_jsonl, sparse, tiny, write_problems

from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.reward.judge import NoJudge
from exprl_jax.rl_run import first_state
from exprl_jax.weights import language_model


def buffers(tree):
    return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


def test_judge_and_reference_of_equal_weights_are_one_set_of_buffers():
    made = opened(tiny("outcome"))
    assert len(made.frozen) == 1
    reference = made.frozen[made.config.reference]
    assert made.judge.params is reference
    state = first_state(made)
    assert not buffers(state.params) & buffers(reference)  # the state is donated, the reference must not be
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_judge_has_parameters_of_its_own():
    made = opened(tiny("outcome", {"judge.model.weights": "random:llama"}))
    assert len(made.frozen) == 2
    assert made.judge.params is not made.frozen[made.config.reference]
    assert made.judge.params is made.frozen[made.config.judge.model]


def test_a_policy_of_another_dtype_is_no_copy_of_the_reference():
    made = opened(tiny("outcome", {"policy.param_dtype": "bfloat16"}))
    state = first_state(made)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(made.frozen[made.config.reference])} == {jnp.dtype("float32")}
    assert len(made.frozen) == 1


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="config.reference: expected the policy's architecture and execution"):
        opened(tiny("outcome", {"reference.weights": "random:llama"}))


def test_sparse_rewards_need_neither_judge_nor_reference(capfd):
    made = opened(sparse())
    assert isinstance(made.judge, NoJudge) and made.frozen == {}
    assert all(problem.reference is None for problem in made.problems)
    printed = capfd.readouterr().err
    assert "policy random:qwen3" in printed and "judge random" not in printed and "reference random" not in printed
    with_kl = opened(sparse({"loss.kl_coef": 0.1}))
    assert list(with_kl.frozen) == [with_kl.config.reference]


def test_where_the_data_hold_nothing_to_judge_no_judge_is_loaded():
    """Routes are by kind: `outcome` for code alone is no use for math."""
    made = opened(sparse({"routes.code": "outcome"}))
    assert isinstance(made.judge, NoJudge) and made.frozen == {}


def test_an_open_ended_problem_needs_a_judge_to_verify_it(tmp_path):
    source = write_problems(tmp_path / "problems.jsonl", [problem | {"reference": None} for problem in PROBLEMS])
    made = opened(sparse({"data.source": source, "code.allow_unsandboxed": True}))
    assert list(made.frozen) == [made.config.judge.model]
    assert set(made.judge.prompts.verify) == {"s0", "s1"} and not made.judge.prompts.score


@pytest.mark.parametrize(
    "key, message", [("rollout.max_tokens", "the policy's context length"), ("judge.max_trace_tokens", "the judge's")]
)
def test_budgets_beyond_a_models_context_are_refused(key, message):
    with pytest.raises(ValueError, match=f"expected at most 4096, {message}"):
        opened(tiny(changes={key: 4096, "updates.row_tokens": 8192}))


@pytest.mark.parametrize(
    "row, message",
    [(PROBLEMS[3] | {"answer": "C"}, "problem 'c0': "), (PROBLEMS[7] | {"answer": "3"}, "problem 'p0': ")],
)
def test_an_answer_that_its_verifier_cannot_use_is_refused_before_the_run(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(tiny("outcome", {"data.source": write_problems(tmp_path / "problems.jsonl", [row])}))


def test_worked_examples_stand_in_every_prompt(monkeypatch):
    monkeypatch.chdir(ROOT)
    made = opened(
        tiny(
            "outcome",
            {
                "data.worked_examples": "configs/data/arithmetic_examples.jsonl",
                "data.max_prompt_tokens": 2048,
                "updates.row_tokens": 2560,
            },
        )
    )
    examples = read_jsonl(ROOT / "configs/data/arithmetic_examples.jsonl")
    for problem in made.problems:
        prompt = made.policy.tokenizer.decode(made.prompts.ids[problem.id])
        at = [prompt.index(example["reference"].strip()) for example in examples]
        assert at == sorted(at) and prompt.index(problem.problem) > at[-1]


def test_equal_weights_are_read_once(monkeypatch):
    """A tokenizer takes seconds, before a run's first sign of life."""
    read = []
    monkeypatch.setattr(
        language_model, "load_tokenizer", lambda spec, date: read.append(spec) or load_tokenizer(spec, date)
    )
    made = opened(tiny())
    assert len(read) == 1 and made.judge.tokenizer is made.policy.tokenizer
    opened(tiny(changes={"judge.model.weights": "random:llama", "reference.param_dtype": "bfloat16"}))
    assert len(read) == 3
