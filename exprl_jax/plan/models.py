"""The models of a run as a plan sees them: those that it trains, keeps frozen, or asks."""

from __future__ import annotations

import functools

from exprl_jax.config import Annotate, Asking, Calibrate, Config, Labelling, Model, Supervised
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.plan.records import POLICY
from exprl_jax.weights.language_model import PUBLISHED, LanguageModel, open_model


@functools.cache
def known_model(model: Model) -> LanguageModel:
    """A model as the programs see it.  Of a published one the tokenizer is not at hand without a network; the byte
    tokenizer's ids of end, padding and digits stand for its own: they are constants in the programs, nothing more."""
    if model.weights in PUBLISHED:
        return LanguageModel(model, PUBLISHED[model.weights], load_tokenizer("byte"), None)
    return open_model(model)


def frozen_models(config: Config | Supervised) -> dict[Model, str]:
    """The models that a training run keeps beside the policy, and what they serve as; equal models are one copy.
    Whether open-ended science in the data has a judge besides, only the data says."""
    roles: dict[Model, list[str]] = {}
    if not isinstance(config, Supervised) and config.has_reference_model:
        roles.setdefault(config.reference, []).append("teacher" if config.task == "distill" else "reference")
    if not isinstance(config, Supervised) and config.has_local_judge:
        roles.setdefault(config.judge.model, []).append("judge")
    if config.lora.rank:
        roles.setdefault(config.policy, []).append("base")
    return {model: "frozen " + " + ".join(names) for model, names in roles.items()}


def asked_models(config: Asking) -> dict[str, Model]:
    """The models that are asked on the mesh, by what they serve as."""
    if isinstance(config, Labelling):
        return {"judge": config.judge.model} if config.judge.backend == "local" else {}
    if isinstance(config, Annotate):
        return {"annotator": config.annotator.model} if config.annotator.backend == "local" else {}
    judges = {f"judge {name}": judge.model for name, judge in config.judges.items() if judge.backend == "local"}
    return judges | ({POLICY: config.policy} if continues(config) else {})


def continues(config: Calibrate) -> bool:
    """Whether the policy goes on from prefixes; where they are only judged, its tokenizer is all that is read."""
    return config.prefixes.rollouts > 0 and config.prefixes.continued
