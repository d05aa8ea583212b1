"""One change at a time from the paper's ExpRL: what each choice of the method and of its execution is worth.

    python -m exprl_jax.main --config=configs/ablations.py:step --workdir=runs/step
    python -m exprl_jax.main --config=configs/stage1.py:process --diff=configs/ablations.py:step      what it changes

Every arm is an arm of the paper, as its line below says, with the keys of that line changed.  Hardware as in
configs/stage1.py.  None has been run at this size.
"""

from configs.base import base, distill, process, sparse

OUTCOME, PROCESS = base, lambda: process(base(), "delta_norm")
DISTILL, GRPO = lambda: distill(base()), lambda: sparse(base())
ARMS = {
    # What the judge sees, and how its score is read.
    "step": (PROCESS, {"judge.unit": "step"}),
    "expected": (OUTCOME, {"judge.readout": "logits"}),
    "argmax": (
        OUTCOME,
        {"judge.readout": "logits", "judge.logits_value": "argmax", "advantage.min_logits_spread": 0.0},
    ),
    # From scores to advantages.
    # The first segment against those of its group, not against the rollout's own end, which punishes it in the end.
    "delta_group": (PROCESS, {"advantage.estimator": "delta_group"}),
    "one_segment": (PROCESS, {"advantage.one_segment": "score"}),
    "drop_rollout": (PROCESS, {"advantage.missing": "drop_rollout"}),
    "mask": (OUTCOME, {"advantage.overlong": "mask"}),
    "penalty": (OUTCOME, {"advantage.overlong": "penalty"}),
    "rloo": (OUTCOME, {"advantage.rollout_estimator": "rloo", "advantage.std_normalise": False}),
    "maxrl": (OUTCOME, {"advantage.rollout_estimator": "maxrl", "advantage.std_normalise": False}),
    "spread": (OUTCOME, {"advantage.min_spread": 0.1}),
    "resample": (OUTCOME, {"rollout.max_resample": 2}),
    # Sparse GRPO, and hints from the frozen base where a group has no success (NuRL, arXiv 2509.25666).
    "hints": (GRPO, {"rollout.hints": 256}),
    # The loss.
    "sequence_mean": (OUTCOME, {"loss.aggregate": "sequence_mean"}),
    "constant": (OUTCOME, {"loss.aggregate": "constant"}),
    "no_kl": (OUTCOME, {"loss.kl_coef": 0.0}),
    "full_kl": (DISTILL, {"distillation.kl": "full"}),
    # How the policy runs and what of it is trained.
    "int8": (OUTCOME, {"policy.execution.kv_dtype": "int8"}),
    "keep_attention": (
        OUTCOME,
        {"policy.execution.remat": "but_attention", "reference.execution.remat": "but_attention"},
    ),
    "lora": (OUTCOME, {"lora.rank": 32, "optimizer.learning_rate": 1e-5}),
    "lora_attention": (OUTCOME, {"lora.rank": 32, "lora.targets": "q,k,v,o", "optimizer.learning_rate": 1e-5}),
}


def get_config(arm: str = "step"):
    """Args: one of `ARMS`."""
    if arm not in ARMS:
        raise ValueError(f"configs/ablations.py:{arm}: expected {', '.join(ARMS)}")
    start, changes = ARMS[arm]
    config = start()
    config.update_from_flattened_dict(changes)
    if config.policy.execution.kv_dtype == "int8":
        config.reference.execution.kv_dtype = "int8"  # one program serves policy and reference
    return config.lock()
