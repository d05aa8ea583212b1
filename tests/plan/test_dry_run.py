"""The dry run's report: every config, the numbers it derives, and its memory against what a run really holds."""

import json
import re

import jax
import pytest
from tiny_runs import config_dict, opened, tiny

from exprl_jax.kinds import KINDS
from exprl_jax.plan.dry_run import describe
from exprl_jax.resolve import resolve, to_dict
from exprl_jax.rl_run import first_state

SECTIONS = ("resolved config", "derived", "parameters", "memory")


def sections(config):
    """The report's parts by their title's first words."""
    parts = re.split(r"(?m)^== ", describe(config))[1:]
    titled = dict(part.split("\n", 1) for part in parts)
    return {name: next(body for title, body in titled.items() if title.startswith(name)) for name in SECTIONS}


def table(body):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in body.strip().splitlines())


def stage1(arm="outcome", changes=None):
    return resolve(config_dict("stage1", arm, changes))


def memory(config):
    """The figures of the memory's table, by program and column; an empty cell is left out."""
    header, *lines = sections(config)["memory"].strip().splitlines()
    columns = [(match[0], match.start()) for match in re.finditer(r"\S+( \S+)*", header)]
    ends = [start for _, start in columns[1:]] + [None]
    rows = [[line[start:end].strip() for (_, start), end in zip(columns, ends)] for line in lines]
    return {
        name: {column: float(cell.replace(",", "")) for (column, _), cell in zip(columns[1:], cells) if cell}
        for name, *cells in rows
    }


@pytest.mark.parametrize("arm", ["outcome", "process", "text", "mixed", "sparse", "distill", "sft"])
def test_the_report_holds_the_config_that_it_describes(arm):
    config = tiny(arm) if arm != "sft" else resolve(config_dict("tiny", arm))
    assert json.loads(sections(config)["resolved config"]) == to_dict(config)


def test_the_papers_runs_are_derived_from_their_config():
    outcome, process = (table(sections(stage1(arm))["derived"]) for arm in ("outcome", "process"))
    assert outcome["mesh"] == process["mesh"] == "data 2 x model 8 = 16 devices"
    assert outcome["policy parameters"] == "4,022,468,096"
    assert (outcome["rollouts a step"], process["rollouts a step"]) == ("360", "576")
    assert (outcome["updates a step"], process["updates a step"]) == ("2", "1")
    assert (outcome["rows an update"], process["rows an update"]) == ("180", "576")
    assert (outcome["waves a step"], outcome["rows a wave"], process["rows a wave"]) == ("9", "40", "32")
    assert outcome["microbatch"] == "4 rows of 20480 tokens, at most 45 an update"
    assert process["microbatch"] == "4 rows of 20480 tokens, at most 144 an update"
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


@pytest.fixture
def in_bytes(monkeypatch):
    """A tiny model is nothing in GiB."""
    monkeypatch.setattr("exprl_jax.plan.tables.GIB", 1)


@pytest.mark.parametrize("data, model", [(8, 1), (2, 4)])
def test_memory_is_what_a_run_holds(data, model, in_bytes):
    config = tiny("outcome", {"mesh.data": data, "mesh.model": model})
    listed, run = memory(config), opened(config)
    state = first_state(run)
    for program in listed.values():
        assert program["policy"] == bytes_held(state.params)
        assert program["Adam"] == bytes_held(state.opt_state) + 8  # and two counts of the state
        assert program["frozen reference + judge"] == bytes_held(run.frozen[config.reference])
        columns = ("calls a step", "TFLOP", "total")
        assert program["total"] == sum(size for name, size in program.items() if name not in columns)
    # Sampling holds the parameters whole along `data`; the judge that answers with its logits reads them as they lie.
    decoding = run.policy.on(run.mesh).decoding_params(run.frozen[config.reference])
    assert listed["sample"]["working copy"] == bytes_held(decoding) > listed["sample"]["policy"]
    assert listed["judge"]["working copy"] == 0  # float32 throughout
    assert listed["train_step"]["gradient"] == bytes_held(state.params)


def test_adapters_and_their_moments_are_small_beside_what_is_frozen(in_bytes):
    """The base is frozen, with the reference and the judge, or beside them if they are of another dtype."""
    config = tiny("lora", {"mesh.data": 4, "mesh.model": 2, "reference.param_dtype": "bfloat16"})
    listed, run = memory(config), opened(config)
    state = first_state(run)
    frozen = {"frozen reference": config.reference, "frozen judge + base": config.policy}
    assert set(frozen.values()) == set(run.frozen)
    for program in listed.values():
        assert program["policy"] == bytes_held(state.params)
        assert {name: program[name] for name in frozen} == {n: bytes_held(run.frozen[m]) for n, m in frozen.items()}
    assert listed["train_step"]["gradient"] == bytes_held(state.params)


def test_memory_follows_the_settings():
    """What is sharded over twice the devices halves; a longer budget costs cache; two frozen models cost two."""

    def listed(changes=None):
        return memory(stage1("outcome", changes))

    base, narrow = listed(), listed({"mesh.data": 1})
    for program, owner in (("sample", "policy"), ("train_step", "Adam"), ("sample", "KV"), ("judge", "KV")):
        assert base[program][owner] == pytest.approx(narrow[program][owner] / 2, rel=0.01)
    longer = listed({"rollout.max_tokens": 32_768, "updates.row_tokens": 40_960})
    assert longer["sample"]["KV"] > 1.9 * base["sample"]["KV"] and longer["judge"]["KV"] == base["judge"]["KV"]
    assert longer["train_step"]["batch"] == pytest.approx(2 * base["train_step"]["batch"], rel=0.01)
    assert "frozen judge" in listed({"judge.model.weights": "Qwen/Qwen3-8B"})["sample"]
    # Scanned layers hold a cache twice; a pool of int8 pages is written in place, and its elements are half as large.
    kv_dtype = {f"{model}.execution.kv_dtype": "int8" for model in ("policy", "reference", "judge.model")}
    assert listed(kv_dtype)["sample"]["KV"] < 0.3 * base["sample"]["KV"]


def test_an_evaluation_and_a_supervised_run_are_planned_too(in_bytes):
    """The policy alone, and what one wave takes; or the update alone."""
    evaluation = resolve(config_dict("evaluate", "tiny", {"mesh.data": 8}))
    derived, listed = table(sections(evaluation)["derived"]), memory(evaluation)
    assert (derived["rollouts a problem"], derived["calls a wave of problems"], derived["rows a wave"]) == (
        "16",
        "4",
        "32",
    )
    assert list(listed) == ["prefill", "sample"] and "Adam" not in listed["sample"]
    supervised = resolve(config_dict("tiny", "sft", {"mesh.data": 8}))
    derived, listed = table(sections(supervised)["derived"]), memory(supervised)
    assert derived["microbatch"] == "8 rows of 512 tokens, at most 1 an update"
    assert list(listed) == ["init_state", "all_finite", "sft_step"]
    assert listed["sft_step"]["Adam"] == pytest.approx(2 * listed["sft_step"]["policy"], rel=0.01)


def test_what_asks_about_fixed_rollouts_is_planned_too(in_bytes):
    """A model at a time, and a wave of each pass."""
    calibration = resolve(config_dict("calibrate", "tiny", {"mesh.data": 8, "prefixes.rollouts": 0}))
    derived, listed = table(sections(calibration)["derived"]), memory(calibration)
    assert derived["judge text parameters"] == "90,816" and derived["rows a call"] == "32"
    assert "policy parameters" not in derived
    weights = listed["judge (text)"]["judge text"]
    assert weights == listed["judge (logits)"]["judge logits"] > 90_816 * 4 / 8
    assert not {"judge logits", "policy", "Adam"} & set(listed["judge (text)"])
    # 2,048 tokens of context a problem, in float32: 2 layers of 2 heads of 16, keys and values.
    assert listed["judge_prefill (text)"]["KV"] == 2048 * 2 * 2 * 16 * 2 * 4
    annotation = resolve(config_dict("annotate", "tiny", {"mesh.data": 8}))
    assert list(memory(annotation)) == ["prefill (annotator)", "sample (annotator)"]
    elsewhere = {"backend": "openai", "endpoint.base_url": "http://x/v1", "endpoint.model": "m"}
    changes = {f"annotator.{key}": value for key, value in elsewhere.items()}
    report = describe(resolve(config_dict("annotate", "tiny", {"mesh.data": 8} | changes)))
    assert "not on this mesh  annotator" in report and report.endswith("no program runs on this mesh")


SPARSE = {f"routes.{kind}": "verifier" for kind in KINDS}


def test_what_a_run_does_not_load_takes_no_memory():
    """Sparse rewards have no judge, and without a KL no reference either."""

    def described(changes):
        config = stage1("outcome", changes)
        return table(sections(config)["derived"]), memory(config)

    derived, programs = described(SPARSE)
    assert derived["frozen copies"].startswith("1") and "frozen reference" in programs["sample"]
    assert "judge" not in programs and "token_logp (reference)" in programs
    assert derived["judge"].endswith("if the data hold open-ended science, Qwen/Qwen3-4B-Instruct-2507 verifies it")
    derived, programs = described(SPARSE | {"loss.kl_coef": 0.0})
    assert derived["frozen copies"] == "0 (none)" and "token_logp (reference)" not in programs
    assert not [owner for program in programs.values() for owner in program if owner.startswith("frozen")]
    endpoint = {"judge.backend": "openai", "judge.endpoint.base_url": "http://judge/v1", "judge.endpoint.model": "m"}
    derived, programs = described(endpoint)
    assert derived["frozen copies"].startswith("1") and "judge" not in programs
    assert "judge" not in derived and "judge" not in described(SPARSE | endpoint)[0] and "judge" not in described({})[0]
    function = {"judge.backend": "function", "judge.function": "mine:score"}
    derived, programs = described(function)
    assert "judge" not in programs and "judge" not in derived
    derived, programs = described({"judge.model.weights": "Qwen/Qwen3-8B"})
    assert derived["frozen copies"].startswith("2") and "judge" in programs
    derived, programs = described({"task": "distill", "updates.per_batch": 1, "loss.kl_coef": 0.0})
    assert derived["frozen copies"].startswith("1") and "judge" not in programs


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesh.data": 3}, "config.rollout.wave: got 4, expected a multiple"),
        ({"segments.rule": "stride:none"}, "config.segments.rule: got 'stride:none'"),
        ({"updates.microbatch": 5}, "updates.microbatch: got 5, expected a multiple of mesh.data = 2"),
        ({"policy.weights": "no/such/model/here"}, "no/such/model/here"),
    ],
)
def test_what_could_not_run_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        describe(stage1("outcome", changes))
