"""The loop end to end, on a tiny model: what it leaves behind, what it compiles, and that the mesh changes nothing."""

import dataclasses
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import exprl_jax.train as loop
from exprl_jax import programs
from exprl_jax.learning import update
from exprl_jax.mesh import DATA, MODEL
from exprl_jax.metrics import CompileLedger
from exprl_jax.model import decoder
from exprl_jax.reward import statistics
from tiny_runs import assert_same_rows, parameters, rows, run, tiny

# Settings that no committed config has together: several waves, several updates a batch, other estimators.
OTHER = {
    "judge.unit": "step",
    "judge.logits_value": "argmax",
    "advantage.estimator": "end_norm",
    "advantage.missing": "drop_rollout",
    "loss.aggregate": "constant",
    "optimizer.clip_norm": 0.5,
    "rollout.temperature": 1.0,
    "rollout.wave": 4,
    "updates.per_batch": 2,
    "updates.microbatch": 8,
    "mesh.data": 2,
    "mesh.model": 4,
    "policy.execution.scan_layers": True,
    "policy.execution.remat": True,
    "reference.execution.scan_layers": True,
    "reference.execution.remat": True,
}
# A budget in which some rollouts of untrained weights end, so that there is something to judge.
LONG = {"rollout.max_tokens": 96, "judge.max_trace_tokens": 400, "segments.max_segments": 12, "log.rollouts": 32}
ARMS = {
    "outcome": tiny("outcome"),
    "process": tiny("process", LONG | {"mesh.data": 4, "mesh.model": 2}),
    "text": tiny("text"),
    "other": tiny("process", OTHER),
}


def keep_saved(patch):
    """A list that gets the parameters of every checkpoint, as they are handed over."""
    saved, save = [], loop.Checkpoints.save

    def keep(self, step, state, position):
        saved.append(jax.device_get(state.params))
        save(self, step, state, position)

    patch.setattr(loop.Checkpoints, "save", keep)
    return saved


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Each arm's finished run, made when first asked for: its config, folder, rows, and what it compiled."""
    made = {}

    def get(arm):
        if arm not in made:
            by_step = []

            class Watched(CompileLedger):
                def report(self):
                    by_step.append(self.compiled + self.cached)
                    return super().report()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "CompileLedger", Watched)
                trained = keep_saved(patch)
                folder = run(ARMS[arm], tmp_path_factory.mktemp(arm) / "run")
            made[arm] = types.SimpleNamespace(
                config=ARMS[arm], folder=folder, rows=rows(folder, True), compiled=by_step, params=trained[-1]
            )
        return made[arm]

    return get


@pytest.fixture(params=list(ARMS))
def arm(request, done):
    return done(request.param)


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_every_promised_file(arm):
    names = {path.name for path in arm.folder.iterdir()}
    assert names == {"config.json", "checkpoints", "metrics.jsonl", "rollouts", "tensorboard", "export", "lock"}
    assert sorted(path.name for path in (arm.folder / "checkpoints").iterdir()) == ["1", "2"]
    assert [path.name for path in sorted((arm.folder / "rollouts").iterdir())] == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    assert list((arm.folder / "tensorboard").glob("events.out.tfevents.*"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in (arm.folder / "export").iterdir()
    }


def test_a_row_holds_every_documented_metric_and_no_other(arm):
    documented = {"step", "data/epoch", "update/skipped_total", *statistics.METRICS, *update.METRICS}
    assert [row["step"] for row in arm.rows] == [1, 2]
    for row in arm.rows:
        assert {name for name in row if not name.startswith("time/")} == documented
        assert {name for name in row if name.startswith("time/")} == {
            *(f"time/{phase}_seconds" for phase in ("sample", "judge", "grade", "logp", "train", "step", "compile")),
            *(f"time/{phase}_tokens_per_second" for phase in ("sample", "judge", "train")),
            "time/compilations",
            "time/compilations_cached",
        }


def test_a_row_says_what_happened(arm):
    for row in arm.rows:
        assert row["update/skipped_total"] == row["update/skipped"] == 0
        assert row["update/tokens"] > 0 and row["grad/norm"] > 0
        assert 0 < row["response/length_mean"] <= row["response/length_max"] <= arm.config.rollout.max_tokens
        assert row["policy/sampler_gap_max"] < 1e-4
        assert row["solve/none"] + row["solve/some"] + row["solve/all"] == pytest.approx(1)
        assert 0 < row["policy/entropy"] < np.log(300)
    if arm.config.updates.per_batch == 1:
        assert arm.rows[0]["loss/kl"] == 0 < arm.rows[1]["loss/kl"]
        assert arm.rows[0]["policy/ratio_max"] == arm.rows[0]["policy/ratio_mean"] == 1
    else:
        assert arm.rows[0]["policy/ratio_max"] > 1


def read_jsonl(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_rollouts_are_written_as_people_read_them(arm):
    samples = read_jsonl(arm.folder / "rollouts" / "step_000001.jsonl")
    problems = {problem["id"]: problem for problem in read_jsonl(arm.config.data.source)}
    count, prompts = arm.config.log.rollouts, arm.config.rollout.prompts
    assert [sample["rollout"] for sample in samples] == [n // prompts for n in range(count)]
    assert len({sample["id"] for sample in samples}) == min(count, prompts)
    text = arm.config.judge.readout == "text"
    for sample in samples:
        assert problems[sample["id"]]["problem"] in sample["prompt"]
        assert "".join(segment["text"] for segment in sample["segments"]) == sample["response"] or "\ufffd" in str(sample)
        assert 0 < sample["length"] <= arm.config.rollout.max_tokens
        assert sample["ended"] or sample["length"] == arm.config.rollout.max_tokens
        assert sample["verdict"] in {str(verdict) for verdict in statistics.VERDICTS}
        assert len(sample["segments"]) <= loop.segment_rule(arm.config).max_segments
        for segment in sample["segments"]:
            if not sample["ended"]:  # D3: overlong rollouts are not judged
                assert segment["score"] is segment["judge"] is None
                assert segment["advantage"] == arm.config.advantage.overlong_penalty
            else:
                assert (segment["judge"] is not None) == text
                assert segment["score"] is None or 0 <= segment["score"] <= 1


def test_rollouts_that_ended_get_scores_of_every_segment(done):
    arm = done("process")
    samples = read_jsonl(arm.folder / "rollouts" / "step_000001.jsonl")
    ended = [sample for sample in samples if sample["ended"]]
    assert len(ended) > 3
    assert max(len(sample["segments"]) for sample in ended) > 2
    for sample in ended:
        scores = [segment["score"] for segment in sample["segments"]]
        advantages = [segment["advantage"] for segment in sample["segments"]]
        assert None not in scores and None not in advantages
        expected = [scores[0] - scores[-1], *np.diff(scores)] if len(scores) > 1 else [0.0]
        np.testing.assert_allclose(advantages, expected, atol=1e-6)
    row = arm.rows[0]
    assert row["judge/parsed"] == 1 and row["judge/asked"] == sum(len(sample["segments"]) for sample in ended)


@pytest.mark.parametrize("name", ["outcome", "other"])
def test_the_export_is_the_policy_for_transformers(name, done):
    import torch
    import transformers

    arm = done(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(arm.folder / "export", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arm.folder / "export")
    tokens = np.array([tokenizer.encode("8 + 2 = 10, and so the answer")], np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()

    policy = loop.prepare(arm.config).policy
    start = decoder.init_params(policy.arch, policy.execution, "float32", jax.random.key(arm.config.seed))
    ours, before = (
        np.asarray(decoder.forward_logits(params, policy.arch, policy.execution, jnp.asarray(tokens)))
        for params in (jax.tree.map(jnp.asarray, arm.params), start)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(before - theirs).max() > 1e-3  # it is the trained one


# ------------------------------------------------------------------------------------------------ what it compiles


PROGRAMS = [f"jit({field.name})" for field in dataclasses.fields(programs.Programs)]


def test_each_program_compiles_once(arm):
    for compiled in arm.compiled:
        assert {name: compiled[name] for name in PROGRAMS} == dict.fromkeys(PROGRAMS, 1)


def test_a_second_step_compiles_nothing(arm):
    """But the slices that Orbax takes of the state when it saves it for the first time, after the first step."""
    assert set(arm.compiled[1] - arm.compiled[0]) <= {"jit(slice)"}
    counts = [row["time/compilations"] + row["time/compilations_cached"] for row in arm.rows]
    assert counts == [compiled.total() for compiled in arm.compiled]
    assert arm.rows[0]["time/compile_seconds"] > 0


# ------------------------------------------------------------------------------------------------ what it shares


def buffers(tree):
    return {
        shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
    }


def test_judge_and_reference_of_equal_weights_are_one_set_of_buffers():
    made = loop.prepare(ARMS["outcome"])
    assert len(made.frozen) == 1
    assert made.judge.params is made.reference
    state = loop._first_state(made)
    assert not buffers(state.params) & buffers(made.reference)  # the state is donated, the reference must not be
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(made.reference), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_judge_has_parameters_of_its_own():
    made = loop.prepare(tiny("outcome", {"judge.model.weights": "random:llama"}))
    assert len(made.frozen) == 2
    assert made.judge.params is not made.reference
    assert made.judge.params is made.frozen[made.config.judge.model]


def test_a_policy_of_another_dtype_is_no_copy_of_the_reference():
    made = loop.prepare(tiny("outcome", {"policy.param_dtype": "bfloat16"}))
    state = loop._first_state(made)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(made.reference)} == {jnp.dtype("float32")}
    assert len(made.frozen) == 1


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="config.reference: expected the policy's architecture and execution"):
        loop.prepare(tiny("outcome", {"reference.weights": "random:llama"}))


# ------------------------------------------------------------------------------------------------ what does not drift


def test_a_constant_judge_changes_nothing(tmp_path, monkeypatch):
    """All scores equal, no KL, no weight decay: no gradient, so not one bit moves."""
    config = tiny("outcome", {"advantage.overlong": "mask", "loss.kl_coef": 0.0, "optimizer.weight_decay": 0.0})
    build = programs.build

    def with_constant_judge(*arguments):
        made = build(*arguments)
        constant = lambda *arguments: jnp.full_like(made.judge(*arguments), 0.2)  # noqa: E731
        return dataclasses.replace(made, judge=constant)

    monkeypatch.setattr(loop.programs_room, "build", with_constant_judge)
    trained = keep_saved(monkeypatch)
    folder = run(config, tmp_path / "run")
    for row in rows(folder):
        assert row["update/tokens"] > 0 and row["judge/asked"] > 0
        assert row["reward/mean"] == 0.5 and row["reward/std"] == row["grad/norm"] == 0
    start = jax.device_get(loop._first_state(loop.prepare(config)).params)
    assert len(trained) == 2
    jax.tree.map(np.testing.assert_array_equal, trained[-1], start)


def test_a_strict_probe_stops_before_the_first_update(tmp_path):
    config = tiny("outcome", {"probe.strict": True, "rollout.max_tokens": 4})
    with pytest.raises(ValueError, match=r"^probe: .*raise it, or show shorter.*\(config.probe.strict is set\)$"):
        run(config, tmp_path / "run")
    assert rows(tmp_path / "run") == []
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "export").exists()


# ------------------------------------------------------------------------------------------------ the mesh


@pytest.mark.parametrize("data, model, devices", [(2, 4, 8), (1, 8, 8), (1, 1, 1)])
def test_the_mesh_changes_nothing(data, model, devices, done, tmp_path, monkeypatch):
    """`outcome` runs on 8 x 1."""
    expected = done("outcome").folder  # made before the mesh is replaced
    made = Mesh(np.array(jax.devices()[:devices]).reshape(data, model), (DATA, MODEL))
    monkeypatch.setattr(loop, "make_mesh", lambda _: made)
    folder = run(tiny("outcome", {"mesh.data": data, "mesh.model": model}), tmp_path / "run")
    assert_same_rows(rows(folder), rows(expected))
    ours, theirs = parameters(folder), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


def test_a_skipped_update_is_null_in_the_row_and_counted():
    bad = {"loss/total": np.float32("nan"), "grad/norm": np.float32("inf"), "policy/ratio_max": 2.0, "update/skipped": 1.0}
    good = {"loss/total": np.float32(0.5), "grad/norm": np.float32(1.0), "policy/ratio_max": 1.0, "update/skipped": 0.0}
    row = loop._over_updates([bad])
    assert row == {"loss/total": None, "grad/norm": None, "policy/ratio_max": 2.0, "update/skipped": 1.0}
    row = loop._over_updates([bad, good])
    assert row == {"loss/total": 0.5, "grad/norm": 1.0, "policy/ratio_max": 2.0, "update/skipped": 1.0}
    assert np.isnan(loop._over_updates([good | {"grad/norm": np.float32("nan")}])["grad/norm"])


def test_a_position_is_refused_in_other_data():
    problem = types.SimpleNamespace(id="a", problem="p", reference="r", answer="1")
    position = {"next_batch": 3, "problems": loop.fingerprint([problem])}
    loop.check_position(position, [problem])
    other = types.SimpleNamespace(id="a", problem="p", reference="r", answer="2")
    with pytest.raises(ValueError, match="config.data.source: its problems are not those of the run's first 3 steps"):
        loop.check_position(position, [other])


@pytest.mark.parametrize(
    "key, said", [("rollout.max_tokens", "the policy's context length"), ("judge.max_trace_tokens", "the judge's")]
)
def test_budgets_beyond_a_models_context_are_refused(key, said):
    with pytest.raises(ValueError, match=f"expected at most 4096, {said}"):
        loop.prepare(tiny(changes={key: 4096}))
