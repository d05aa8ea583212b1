"""Judges against verifiers on fixed rollouts: with the reference, without, and with another problem's.

    python -m exprl_jax.main --config=configs/calibrate.py --workdir=runs/calibration \\
        --config.rollouts='runs/outcome/rollouts/*.jsonl'
    python -m exprl_jax.main --config=configs/calibrate.py:smoke --workdir=runs/smoke-judges   after configs/smoke.py
    python -m exprl_jax.main --config=configs/calibrate.py:tiny --workdir=runs/tiny-judges     after configs/tiny.py

The paper's Tables 5 and 6 are `table.txt` and `calibration.csv`, its Fig. 11 `histograms.png` and `prefix_check.png`.
Rollouts are files of a run (`rollouts/`) or an evaluation (`samples/`).  Kill it and start it again: it goes on.
"""

from ml_collections import ConfigDict

from configs import smoke, tiny
from configs.base import QWEN3_8B, base


def get_config(arm: str = "4b"):
    """Args: `4b` (the paper's judges, 0.6B to 14B, the 4B by both read-outs), `smoke` or `tiny`."""
    if arm == "4b":
        config = base()
        segments = dict(rule="heading", max_segments=10)
        sampling = dict(samples=32, group=16, wave=4, slots=0, max_tokens=16_384, temperature=0.8)
        made = _calibration(config, "runs/outcome/rollouts/*.jsonl", segments, sampling)
        made.wave, made.group = 4, 8
        made.repeats = dict(rollouts=200, count=8, temperature=0.8)
        made.prefixes.rollouts = 200
        made.judges = {"4B": _judge(config, "text"), "4B logits": _judge(config, "logits")}
        for name, weights in (("600M", "Qwen/Qwen3-0.6B"), ("8B", QWEN3_8B), ("14B", "Qwen/Qwen3-14B")):
            made.judges[name] = _judge(config, "text")
            made.judges[name].model.weights = weights
    elif arm in ("smoke", "tiny"):
        config = {"smoke": smoke, "tiny": tiny}[arm].get_config().copy_and_resolve_references()
        config.unlock()
        sampling = dict(samples=4, group=4, wave=8, slots=0, max_tokens=24, temperature=0.8)
        made = _calibration(
            config, f"runs/{arm}/rollouts/*.jsonl", config.segments.to_dict() | dict(max_segments=3), sampling
        )
        made.wave, made.group = 8, 4
        made.repeats = dict(rollouts=4, count=3, temperature=0.8)
        made.prefixes.rollouts = 4
        made.judges = {"logits": _judge(config, "logits"), "text": _judge(config, "text")}
        made.judges["text"].update(max_tokens=64, max_context_tokens=2048 if arm == "tiny" else 512)
    else:
        raise ValueError(f"configs/calibrate.py:{arm}: expected 4b, smoke or tiny")
    return made.lock()


def _calibration(config: ConfigDict, rollouts: str, segments: dict, sampling: dict) -> ConfigDict:
    """A calibration with what it shares with an RL config; no judge yet."""
    shared = {name: config[name].to_dict() for name in ("data", "mesh", "policy", "truth", "grader", "code")}
    made = ConfigDict(
        dict(
            task="calibrate",
            seed=config.seed,
            rollouts=rollouts,
            judges={},
            stored="",
            references="correct,none,wrong",
            reference_last=True,
            wave=1,
            group=1,
            repeats={},
            prefixes=dict(rollouts=0, continued=True, segments=segments, sampling=sampling),
            **shared,
        )
    )
    del made.data.held_out, made.data.allow_held_out
    made.policy.param_dtype = config.judge.model.param_dtype
    return made


def _judge(config: ConfigDict, readout: str) -> ConfigDict:
    return ConfigDict(config.judge.to_dict() | dict(readout=readout))
