"""Imitation in the miniature: its base policy from nothing, and the baselines on references in a foreign style.

    python -m configs.mini.make base
    python -m exprl_jax.main --config=configs/mini/sft.py:answer_first --workdir=runs/mini-sft
    python -m exprl_jax.main --config=configs/mini/sft.py:forward --workdir=runs/mini-sft-forward

The first writes the corpus, runs this file's default on it, and keeps the result in configs/mini/models/base.
"""

from configs.mini.settings import BASE, imitation, problems

CORPUS = "runs/mini-corpus.jsonl"


def get_config(arm: str = "base"):
    """Args: `base`, `answer_first` or `forward`."""
    if arm == "base":
        config = imitation(CORPUS, "random:configs/mini/models/start", epochs=1, batch=64, learning_rate=3e-3)
    elif arm in ("answer_first", "forward"):
        source = problems("hard", "train" if arm == "answer_first" else "train_forward")
        config = imitation(source, BASE, epochs=10, batch=32, learning_rate=3e-4)
    else:
        raise ValueError(f"configs/mini/sft.py:{arm}: expected base, answer_first or forward")
    return config.lock()
