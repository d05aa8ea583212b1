"""The dry run's report: every config, the numbers it derives, and its memory against what a run really holds."""

import json
import re

import jax
import pytest
from tiny_runs import config_dict, opened, tiny

from exprl_jax.plan.dry_run import describe
from exprl_jax.resolve import resolve, to_dict
from exprl_jax.rl_run import first_state

SECTIONS = ("resolved config", "derived", "parameters", "memory a device")


def sections(config):
    """The report's parts by their title's first words."""
    parts = re.split(r"(?m)^== ", describe(config))[1:]
    titled = dict(part.split("\n", 1) for part in parts)
    return {name: next(body for title, body in titled.items() if title.startswith(name)) for name in SECTIONS}


def table(body):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in body.strip().splitlines())


def stage1(arm="outcome", changes=None):
    return resolve(config_dict("stage1", arm, changes))


@pytest.mark.parametrize("arm", ["outcome", "process", "text", "mixed", "sparse", "distill"])
def test_the_report_holds_the_config_that_it_describes(arm):
    config = tiny(arm)
    assert json.loads(sections(config)["resolved config"]) == to_dict(config)


def test_the_papers_runs_are_derived_from_their_config():
    outcome, process = (table(sections(stage1(arm))["derived"]) for arm in ("outcome", "process"))
    assert outcome["mesh"] == process["mesh"] == "data 2 x model 8 = 16 devices"
    assert outcome["policy parameters"] == "4,022,468,096"
    assert (outcome["rollouts a step"], process["rollouts a step"]) == ("360", "576")
    assert (outcome["updates a step"], process["updates a step"]) == ("2", "1")
    assert (outcome["rows an update"], process["rows an update"]) == ("180", "576")
    assert (outcome["waves a step"], outcome["rows a wave"], process["rows a wave"]) == ("9", "40", "32")
    assert outcome["microbatch"] == process["microbatch"] == "4 rows of 20480 tokens"
    assert outcome["optimizer updates in all"] == "460"
    assert outcome["frozen copies"] == "1 (Qwen/Qwen3-4B-Instruct-2507)"


def test_the_sharding_table_names_every_parameter_once():
    listed = sections(stage1())["parameters"].splitlines()
    names = [line.split()[0] for line in listed if line.strip()]
    assert len(names) == len(set(names)) == 2 + 11  # embedding and final norm; a Qwen3 layer
    embed = next(line for line in listed if line.startswith("embed"))
    assert "(151936, 2560)" in embed and "(18992, 1280)" in embed  # vocabulary over 8, width over 2


def bytes_held(tree):
    """On the first device."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == first)


@pytest.mark.parametrize("data, model", [(8, 1), (2, 4)])
def test_resident_memory_is_what_a_run_holds(data, model, monkeypatch):
    monkeypatch.setattr("exprl_jax.plan.dry_run._GIB", 1)  # bytes: a tiny model is nothing in GiB
    config = tiny("outcome", {"mesh.data": data, "mesh.model": model})
    listed = {k: float(v.split()[0]) for k, v in table(sections(config)["memory a device"]).items()}
    run = opened(config)
    state = first_state(run)
    assert listed["resident: policy"] == bytes_held(state.params)
    assert listed["resident: Adam"] == bytes_held(state.opt_state)
    assert listed["resident: frozen"] == bytes_held(run.frozen[config.reference])
    # Sampling holds the parameters whole along `data`; the judge that answers with its logits reads them as they lie.
    decoding = run.policy.on(run.mesh).decoding_params(run.frozen[config.reference])
    assert listed["sampling: policy copy"] == bytes_held(decoding) > listed["resident: policy"]
    assert listed["judging: judge copy"] == 0  # float32 throughout
    for phase in ("sampling", "judging", "training"):
        parts = sum(size for name, size in listed.items() if name.startswith(("resident", phase)))
        assert listed[f"= while {phase}"] == pytest.approx(parts)


def test_memory_follows_the_settings():
    """What is sharded over twice the devices halves; a longer budget costs cache; two frozen models cost two."""

    def memory(changes):
        return {
            k: float(v.split()[0]) for k, v in table(sections(stage1("outcome", changes))["memory a device"]).items()
        }

    base, narrow = memory({}), memory({"mesh.data": 1})
    for name in ("resident: policy", "resident: Adam", "sampling: KV cache", "judging: KV cache"):
        assert base[name] == pytest.approx(narrow[name] / 2, abs=0.002)
    longer = memory({"rollout.max_tokens": 32_768, "updates.row_tokens": 40_960})
    assert longer["sampling: KV cache"] > 1.9 * base["sampling: KV cache"]
    assert longer["judging: KV cache"] == base["judging: KV cache"]
    wider, more = memory({"updates.row_tokens": 40_960}), memory({"updates.microbatch": 8})
    for name in base:
        grows = name in ("training: activations", "= while training")
        assert (wider[name] > 1.05 * base[name]) == (more[name] > 1.05 * base[name]) == grows, name
    assert (
        wider["training: activations"]
        == more["training: activations"]
        == pytest.approx(2 * base["training: activations"], abs=0.002)
    )
    two = memory({"judge.model.weights": "Qwen/Qwen3-8B"})
    assert two["resident: frozen"] > 2.5 * base["resident: frozen"]


SPARSE = {f"routes.{kind}": "verifier" for kind in ("math", "choice", "science", "code")}


def test_what_a_run_does_not_load_takes_no_memory():
    """Sparse rewards have no judge, and without a KL no reference either."""

    def described(changes):
        found = sections(stage1("outcome", changes))
        return table(found["derived"]), table(found["memory a device"])

    derived, memory = described(SPARSE)
    assert derived["frozen copies"].startswith("1")
    assert not [name for name in memory if "judg" in name] and memory["resident: frozen"] != "0.000 GiB"
    assert derived["judge"].endswith("if the data hold open-ended science, Qwen/Qwen3-4B-Instruct-2507 verifies it")
    derived, memory = described(SPARSE | {"loss.kl_coef": 0.0})
    assert derived["frozen copies"] == "0 (none)" and memory["resident: frozen"] == "0.000 GiB"
    endpoint = {"judge.backend": "openai", "judge.endpoint.base_url": "http://judge/v1", "judge.endpoint.model": "m"}
    derived, memory = described(endpoint)
    assert derived["frozen copies"].startswith("1") and not [name for name in memory if "judg" in name]
    assert "judge" not in derived and "judge" not in described(SPARSE | endpoint)[0] and "judge" not in described({})[0]
    derived, memory = described({"judge.model.weights": "Qwen/Qwen3-8B"})
    assert derived["frozen copies"].startswith("2") and "judging: KV cache" in memory
    derived, memory = described({"task": "distill", "updates.per_batch": 1, "loss.kl_coef": 0.0})
    assert derived["frozen copies"].startswith("1") and not [name for name in memory if "judg" in name]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"mesh.data": 3}, "config.rollout.wave: got 4, expected a multiple"),
        ({"segments.rule": "stride:none"}, "config.segments.rule: got 'stride:none'"),
        ({"updates.microbatch": 5}, "updates.microbatch: got 5, expected a multiple of mesh.data = 2"),
        ({"policy.weights": "no/such/model/here"}, "no/such/model/here"),
    ],
)
def test_what_could_not_run_is_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        describe(stage1("outcome", changes))
