"""What is written of a rollout's tokens."""

import types

import numpy as np

from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.records import Rollouts
from exprl_jax.rollout_log import token_row
from exprl_jax.wave import Wave


def test_a_part_of_a_rollout_has_its_own_tokens_log_probs_and_entropies():
    tokenizer = load_tokenizer("byte")
    ids = [*tokenizer.encode("a\u00e9b"), tokenizer.eos_ids[0]]
    tokens = np.zeros((1, 2, 8), np.int32)
    tokens[0, 1, : len(ids)] = ids
    logp = np.where(tokens > 0, -np.arange(8) / 3, 0).astype(np.float32)
    rollouts = Rollouts(tokens, tokens > 0, logp, -2 * logp, np.ones((1, 2), bool))
    wave = Wave([None], rollouts, [[np.array([]), np.array([2, 5])]], [["", "a\u00e9b"]])
    run = types.SimpleNamespace(policy=types.SimpleNamespace(tokenizer=tokenizer))
    first = {"token_text": ["a", "\\xc3"], "token_logp": [0.0, -0.3333], "token_entropy": [0.0, 0.6667]}
    assert token_row(run, wave, 0, 1, slice(0, 2)) == first
    rest = token_row(run, wave, 0, 1, slice(2, 5))
    assert rest["token_text"][:2] == ["\\xa9", "b"] and rest["token_text"][2]  # the end has a name
    assert rest["token_logp"] == [-0.6667, -1.0, -1.3333]
    assert rest["token_entropy"] == [1.3333, 2.0, 2.6667]
