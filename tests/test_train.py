"""The loop end to end, on a tiny model: what it leaves behind, what it compiles, and that the mesh changes nothing."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from jax.sharding import Mesh
from stub_endpoint import Answer, StubEndpoint
from tiny_runs import (
    LONG,
    MIXED,
    PROBLEMS,
    assert_same_parameters,
    assert_same_rows,
    opened,
    parameters,
    read_jsonl,
    rows,
    run,
    sparse,
    tiny,
    write_problems,
)

from exprl_jax import programs, rl_run, train
from exprl_jax.data.tokenizer import load_tokenizer
from exprl_jax.learning import update
from exprl_jax.learning.advantages import grpo
from exprl_jax.mesh import DATA, MODEL
from exprl_jax.model.decoder import Transformer
from exprl_jax.reward import statistics
from exprl_jax.reward.segments import segment_rule
from exprl_jax.rl_run import first_state
from exprl_jax.rollout import usage
from exprl_jax.run import loop
from exprl_jax.run.clock import CompileLedger
from exprl_jax.weights.folder import export_folder
from tests.oracles.tiny_decoder import forward_logits

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
    "policy.execution.remat": "full",
    "reference.execution.scan_layers": True,
    "reference.execution.remat": "full",
}
ARMS = {
    "outcome": lambda folder: tiny("outcome"),
    "process": lambda folder: tiny("process", LONG | {"mesh.data": 4, "mesh.model": 2}),
    "text": lambda folder: tiny("text"),
    "other": lambda folder: tiny("process", OTHER),
    "sparse": lambda folder: sparse(
        {
            "advantage.rollout_estimator": "rloo",
            "loss.entropy_coef": 1e-3,
            "loss.dual_clip": 0.0,
            "loss.aggregate": "sequence_sum",
        }
    ),
    "mixed": lambda folder: tiny(
        "outcome",
        MIXED
        | {
            "data.source": write_problems(folder / "problems.jsonl", PROBLEMS),
            "judge.model.weights": other_family(folder / "judge"),
        },
    ),
}


def other_family(folder):
    """A random Llama with a byte-pair vocabulary of its own, as a folder: nothing of it is the policy's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, levels])
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|turn|>"],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([problem["problem"] for problem in PROBLEMS] * 4, trainer)
    library = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    library.chat_template = (
        "{%- for message in messages -%}{{- '<|turn|>' + message.role + '\n' + message.content + '<|end|>' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|turn|>assistant\n' -}}{%- endif -%}"
    )
    library.save_pretrained(folder.with_name("tokenizer"))
    tokenizer = load_tokenizer(str(folder.with_name("tokenizer")))
    small = opened(tiny("outcome", {"policy.weights": "random:llama", "reference.weights": "random:llama"})).policy
    arch = dataclasses.replace(small.arch, vocab_size=tokenizer.vocab_size, layers=1)
    params = Transformer(arch, small.execution).init_params(jax.random.key(1), "float32")
    export_folder(params, arch, small.execution, folder, tokenizer, "float32")
    return str(folder)


def keep_saved(patch):
    """A list that gets the parameters of every checkpoint, as they are handed over."""
    saved, save = [], loop.Checkpoints.save

    def keep(self, step, state, position, best):
        saved.append(jax.device_get(state.params))
        save(self, step, state, position, best)

    patch.setattr(loop.Checkpoints, "save", keep)
    return saved


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Each arm's finished run, made when first asked for: its config, folder, rows, and what it compiled."""
    made = {}

    def get(arm):
        if arm not in made:
            by_step, place = [], tmp_path_factory.mktemp(arm)
            config = ARMS[arm](place)

            class Watched(CompileLedger):
                def report(self):
                    by_step.append(self.compiled + self.cached)
                    return super().report()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "CompileLedger", Watched)
                trained = keep_saved(patch)
                folder = run(config, place / "run")
            made[arm] = types.SimpleNamespace(
                config=config, folder=folder, rows=rows(folder, True), compiled=by_step, params=trained[-1]
            )
        return made[arm]

    return get


@pytest.fixture(params=list(ARMS))
def arm(request, done):
    return done(request.param)


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_every_promised_file(arm):
    names = {path.name for path in arm.folder.iterdir()}
    assert names == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "models.json",
        "report.html",
        "rollouts",
        "tensorboard",
        "model",
        "export",
        "lock",
    }
    assert sorted(path.name for path in (arm.folder / "checkpoints").iterdir()) == ["1", "2"]
    assert [path.name for path in sorted((arm.folder / "rollouts").iterdir())] == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    assert list((arm.folder / "tensorboard").glob("events.out.tfevents.*"))
    description = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert description | {"model.safetensors"} <= {path.name for path in (arm.folder / "export").iterdir()}
    assert description <= {path.name for path in (arm.folder / "model").iterdir()}


def test_a_row_holds_every_documented_metric_and_no_other(arm):
    documented = {"step", "data/epoch", "update/skipped_total", "update/without_advantage", "update/padding"}
    documented |= {*statistics.METRICS, *usage.METRICS, *update.METRICS}
    if {sample["kind"] for sample in read_jsonl(arm.folder / "rollouts" / "step_000001.jsonl")} > {"math"}:
        kinds = ("choice", "code", "math", "science")
        documented |= {f"{name}/{kind}" for name in statistics.BY_KIND for kind in kinds}
    assert [row["step"] for row in arm.rows] == [1, 2]
    for row in arm.rows:
        assert {name for name in row if not name.startswith("time/")} == documented
        assert {name for name in row if name.startswith("time/")} == {
            *(
                f"time/{phase}_seconds"
                for phase in ("sample", "judge", "grade", "pack", "logp", "train", "step", "compile")
            ),
            *(f"time/{phase}_tokens_per_second" for phase in ("sample", "judge", "train")),
            "time/compilations",
            "time/compilations_cached",
            "time/graded_rows",
            "time/grading_seconds",
        }


def test_a_row_says_what_happened(arm):
    for row in arm.rows:
        assert row["update/skipped_total"] == row["update/skipped"] == 0
        assert row["update/tokens"] > 0 and row["grad/norm"] > 0 and 0 < row["update/padding"] < 1
        assert 0 < row["response/length_mean"] <= row["response/length_max"] <= arm.config.rollout.max_tokens
        assert row["policy/sampler_gap_max"] < 1e-4
        assert row["solve/none"] + row["solve/some"] + row["solve/all"] == pytest.approx(1)
        assert 0 < row["policy/entropy"] < np.log(300)
    if arm.config.updates.per_batch == 1:
        kl = [row["loss/kl"] for row in arm.rows]
        assert kl[0] == 0 < kl[1] if arm.config.loss.kl_coef else kl == [None] * 2
        assert arm.rows[0]["policy/ratio_max"] == arm.rows[0]["policy/ratio_mean"] == 1
    else:
        assert arm.rows[0]["policy/ratio_max"] > 1


def test_rollouts_are_written_as_people_read_them(arm):
    samples = read_jsonl(arm.folder / "rollouts" / "step_000001.jsonl")
    problems = {problem["id"]: problem for problem in read_jsonl(arm.config.data.source)}
    count, prompts = arm.config.log.rollouts, arm.config.rollout.prompts
    assert [sample["rollout"] for sample in samples] == [n // prompts for n in range(count)]
    assert len({sample["id"] for sample in samples}) == min(count, prompts)
    text = arm.config.judge.readout == "text"
    for sample in samples:
        problem = problems[sample["id"]]
        assert set(sample) == {
            "id",
            "rollout",
            "domain",
            "kind",
            "problem",
            "reference",
            "answer",
            "prompt",
            "response",
            "length",
            "ended",
            "verdict",
            "segments",
        }
        assert problem["problem"] in sample["prompt"]
        assert sample["problem"] == problem["problem"]
        assert sample["answer"] == (
            None if sample["kind"] == "code" else problem["answer"]
        )  # its tests may be megabytes
        assert sample["domain"] == problem.get("domain", "math")
        assert sample["kind"] == ("choice" if problem.get("choices") else sample["domain"])
        route = getattr(arm.config.routes, sample["kind"])
        assert sample["reference"] == (None if arm.config.routes.math == "verifier" else problem["reference"])
        assert "".join(segment["text"] for segment in sample["segments"]) == sample["response"] or "\ufffd" in str(
            sample
        )
        assert 0 < sample["length"] <= arm.config.rollout.max_tokens
        assert sample["ended"] or sample["length"] == arm.config.rollout.max_tokens
        assert sample["verdict"] in {str(verdict) for verdict in statistics.VERDICTS}
        assert len(sample["segments"]) <= segment_rule(arm.config).max_segments
        assert sum(len(segment["token_logp"]) for segment in sample["segments"]) == sample["length"]
        for segment in sample["segments"]:
            assert len(segment["token_text"]) == len(segment["token_logp"]) == len(segment["token_entropy"])
            assert max(segment["token_logp"]) <= 0 <= min(segment["token_entropy"])
        for segment in sample["segments"]:
            if not sample["ended"]:  # D3: overlong rollouts are not judged
                assert segment["judge"] is None and (segment["score"] is None or route == "verifier")
                assert segment["advantage"] == arm.config.advantage.overlong_penalty
            elif route == "verifier":
                assert segment["judge"] is None and segment["score"] == (sample["verdict"] == "correct")
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

    policy = opened(arm.config).policy
    start = Transformer(policy.arch, policy.execution).init_params(jax.random.key(arm.config.seed), "float32")
    ours, before = (
        np.asarray(forward_logits(params, policy.arch, policy.execution, jnp.asarray(tokens)))
        for params in (jax.tree.map(jnp.asarray, arm.params), start)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(before - theirs).max() > 1e-3  # it is the trained one


# ------------------------------------------------------------------------------------------------ what it compiles


def test_each_program_compiles_once(arm):
    """Of the judge one for all routes, and, where prefixes are scored together, another for verdicts."""
    always = {"init_state", "prefill", "sample", "train_step"}
    if arm.config.loss.kl_coef > 0 or arm.config.updates.per_batch > 1:
        always.add("token_logp")
    routes, judge = arm.config.routes, arm.config.judge
    if routes.math != "verifier":
        together = "process" in routes.all and judge.unit == "prefix"
        always |= {"judge_prefill", "judge_branches" if together else "judge"}
    if arm.config.data.source.endswith("problems.jsonl"):  # with questions whose answers a judge verifies
        always.add("judge")
    every = {"token_logp", "judge_prefill", "judge", "judge_branches", "teacher_signal", "distill_step", "sft_step"}
    every |= always
    for compiled in arm.compiled:
        assert {name: compiled[f"jit({name})"] for name in every} == {name: int(name in always) for name in every}


def test_a_second_step_compiles_nothing(arm):
    """But the slices that Orbax takes of the state when it saves it for the first time, after the first step."""
    assert set(arm.compiled[1] - arm.compiled[0]) <= {"jit(slice)"}
    counts = [row["time/compilations"] + row["time/compilations_cached"] for row in arm.rows]
    assert counts == [compiled.total() for compiled in arm.compiled]
    assert arm.rows[0]["time/compile_seconds"] > 0


# ------------------------------------------------------------------------------------------------ what does not drift


@pytest.mark.parametrize("left_out", [True, False])
def test_a_constant_judge_changes_nothing(left_out, tmp_path, monkeypatch):
    """All scores equal, no KL, no weight decay: the update is left out.  Made all the same, it has no gradient, so not
    one bit moves."""
    config = tiny("outcome", {"advantage.overlong": "mask", "loss.kl_coef": 0.0, "optimizer.weight_decay": 0.0})
    build, pack_updates = programs.build_judge, train.pack_updates

    def with_constant_judge(*arguments):
        made = build(*arguments)
        constant = lambda *arguments: jnp.full_like(made.judge(*arguments), 0.2)  # noqa: E731
        return dataclasses.replace(made, judge=constant)

    def to_be_made(*arguments):
        return [packed._replace(has_advantage=True) for packed in pack_updates(*arguments)]

    monkeypatch.setattr(programs, "build_judge", with_constant_judge)
    if not left_out:
        monkeypatch.setattr(train, "pack_updates", to_be_made)
    trained = keep_saved(monkeypatch)
    folder = run(config, tmp_path / "run")
    for row in rows(folder):
        assert row["judge/asked"] > 0 and row["reward/mean"] == 0.5 and row["reward/std"] == 0
        if left_out:
            assert row["update/without_advantage"] == 1 and row["grad/norm"] is None
        else:
            assert row["update/without_advantage"] == 0 and row["update/tokens"] > 0 and row["grad/norm"] == 0
    start = jax.device_get(first_state(opened(config)).params)
    assert len(trained) == 2
    jax.tree.map(np.testing.assert_array_equal, trained[-1], start)


def test_a_strict_probe_stops_before_the_first_update(tmp_path):
    config = tiny("outcome", {"probe.strict": True, "rollout.max_tokens": 4})
    with pytest.raises(ValueError, match=r"^probe: .*raise it, or show shorter.*\(config.probe.strict is set\)$"):
        run(config, tmp_path / "run")
    assert rows(tmp_path / "run") == []
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "export").exists()


def test_stage_two_goes_on_from_a_first_stages_workdir(done, tmp_path):
    """From its newest checkpoint, bit for bit, and without its optimizer's state."""
    before = done("outcome")
    made = opened(sparse({"policy.weights": str(before.folder)}))
    state = first_state(made)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)
    assert int(state.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(state.opt_state) if np.ndim(x))
    folder = run(made.config, tmp_path / "run")
    assert len(rows(folder)) == 2
    assert any((parameters(folder)[name] != parameters(before.folder)[name]).any() for name in parameters(folder))


# ------------------------------------------------------------------------------------------------ the mesh


@pytest.mark.parametrize("data, model, devices", [(2, 4, 8), (1, 8, 8), (1, 1, 1)])
def test_the_mesh_changes_nothing(data, model, devices, done, tmp_path, monkeypatch):
    """`outcome` runs on 8 x 1."""
    expected = done("outcome").folder  # made before the mesh is replaced
    made = Mesh(np.array(jax.devices()[:devices]).reshape(data, model), (DATA, MODEL))
    monkeypatch.setattr(rl_run, "make_mesh", lambda _: made)
    folder = run(tiny("outcome", {"mesh.data": data, "mesh.model": model}), tmp_path / "run")
    assert_same_rows(rows(folder), rows(expected))
    ours, theirs = parameters(folder), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------------------ all kinds at once


def samples_of(arm):
    """The first step's rollouts by problem; all of them are written."""
    found = {}
    for sample in read_jsonl(arm.folder / "rollouts" / "step_000001.jsonl"):
        found.setdefault(sample["id"], []).append(sample)
    assert {len(group) for group in found.values()} == {arm.config.rollout.group} and len(found) == len(PROBLEMS)
    return found


def test_each_kind_of_a_mixed_batch_has_its_own_estimator(done):
    arm = done("mixed")
    penalty, steps = arm.config.advantage.overlong_penalty, 0
    for group in samples_of(arm).values():
        kind = group[0]["kind"]
        ended = [sample for sample in group if sample["ended"]]
        if kind in ("math", "choice"):
            for sample in ended:
                scores = [segment["score"] for segment in sample["segments"]]
                expected = np.diff(scores, prepend=scores[-1:])
                np.testing.assert_allclose([s["advantage"] for s in sample["segments"]], expected, atol=1e-6)
                steps = max(steps, len(scores))
            continue
        assert all(len(sample["segments"]) == 1 for sample in group)
        assert all(segment["text"] == sample["response"] for sample in group for segment in sample["segments"])
        if ended:
            reward = np.array([[sample["segments"][0]["score"] for sample in ended]], np.float64)
            expected, _ = grpo(reward, np.ones(reward.shape, bool), std_normalise=True, min_spread=0.0)
            given = [sample["segments"][0]["advantage"] for sample in ended]
            np.testing.assert_allclose(given, expected[0], atol=1e-3)
        overlong = [sample["segments"][0]["advantage"] for sample in group if not sample["ended"]]
        assert overlong == [penalty] * len(overlong)
    assert steps > 2


def test_each_kind_of_a_mixed_batch_has_its_own_verifier(done):
    verdicts = {}
    for group in samples_of(done("mixed")).values():
        verdicts.setdefault(group[0]["kind"], set()).update(sample["verdict"] for sample in group)
    assert verdicts["science"] <= {"correct", "wrong", "missing"} and verdicts["science"] & {"correct", "wrong"}
    assert verdicts["math"] <= {"no_answer", "wrong", "unparsable"}  # of random bytes
    assert verdicts["choice"] <= {"no_answer", "wrong", "unparsable", "correct"}
    assert verdicts["code"] <= {"no_answer", "wrong"}


def test_numbers_by_kind_are_those_of_the_kinds_rollouts(done):
    arm = done("mixed")
    groups, row = samples_of(arm), arm.rows[0]
    for kind in ("math", "choice", "science", "code"):
        of_kind = [sample for group in groups.values() for sample in group if sample["kind"] == kind]
        assert row[f"response/length_mean/{kind}"] == np.mean([sample["length"] for sample in of_kind])
        assert row[f"response/overlong/{kind}"] == np.mean([not sample["ended"] for sample in of_kind])
        known = [sample["verdict"] == "correct" for sample in of_kind if sample["verdict"] != "missing"]
        assert row[f"solve/accuracy/{kind}"] == pytest.approx(np.mean(known))
    assert row["solve/missing"] == np.mean([s["verdict"] == "missing" for group in groups.values() for s in group])
    # The verifier's rewards are not the judge's.
    asked = sum(len(s["segments"]) for group in groups.values() for s in group if s["ended"] and s["kind"] != "code")
    assert row["judge/asked"] == asked


def test_text_and_not_tokens_goes_between_policy_and_judge(done):
    made = opened(done("mixed").config)
    ours, theirs = made.policy.tokenizer, made.judge.tokenizer
    assert theirs.vocab_size != ours.vocab_size and made.judge.params["embed"].shape[0] == theirs.vocab_size
    trace = "### Why do apples fall?"
    assert theirs.decode(theirs.encode(trace)) == trace == ours.decode(ours.encode(trace))
    assert len(theirs.encode(trace)) < len(ours.encode(trace))
    assert set(made.judge.prompts.score) == {"m0", "m1", "m2", "c0", "c1", "s0", "s1"}
    for problem in made.problems:
        if problem.id in made.judge.prompts.score:
            shown = theirs.decode(made.judge.prompts.score[problem.id].head)
            assert problem.problem in shown and problem.reference in shown
            assert all(f"{label}. {text}" in shown for label, text in problem.choices)


def test_an_endpoint_judges_and_verifies_like_a_local_judge(tmp_path, monkeypatch):
    """A real run against a server on this machine; what it answers are the scores and verdicts of the rollouts."""
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def answer(seen, before):
        return Answer("Verdict: yes") if "Reference answer" in seen.content else Answer("Fine.\nScore: 4")

    with StubEndpoint(answer) as stub:
        changes = MIXED | {
            "data.source": write_problems(tmp_path / "problems.jsonl", PROBLEMS),
            "judge.backend": "openai",
            "judge.readout": "text",
            "judge.endpoint.base_url": stub.base_url,
            "judge.endpoint.model": "stub",
            "judge.endpoint.api_key_variable": "JUDGE_KEY",
            "judge.endpoint.concurrency": 4,
            "judge.endpoint.seconds": 60.0,
            "judge.endpoint.retries": 1,
            "judge.endpoint.max_missing": 0.1,
            "steps": 1,
        }
        folder = run(tiny("outcome", changes), tmp_path / "run")
        seen = [request.content for request in stub.seen]
    row, samples = rows(folder)[0], read_jsonl(folder / "rollouts" / "step_000001.jsonl")
    assert row["judge/asked"] == sum("Score:" in content for content in seen) > 0 and row["judge/parsed"] == 1
    assert sum("Reference answer" in content for content in seen) == 2 * 4  # every open-ended rollout, once
    assert row["solve/accuracy/science"] == 1 and row["solve/missing"] == 0
    for sample in samples:
        for segment in sample["segments"]:
            if segment["judge"] is not None:
                assert segment["score"] == 0.75 and segment["judge"] == "Fine.\nScore: 4" and sample["kind"] != "code"


# ------------------------------------------------------------------------------------------------ sampling again


def test_a_run_that_never_samples_again_is_the_run_without_resampling(done, tmp_path):
    folder = run(tiny("outcome", {"rollout.max_resample": 2}), tmp_path / "run")
    assert [row["rollout/resampled"] for row in rows(folder)] == [0, 0]
    assert rows(folder) == rows(done("outcome").folder)
    assert_same_parameters(folder, done("outcome").folder)


def test_rows_that_were_graded_are_counted(arm):
    """Multiple choice is graded where it is submitted, and open-ended answers by the judge."""
    samples = read_jsonl(arm.folder / "rollouts" / "step_000001.jsonl")
    graded = {sample["id"] for sample in samples if sample["kind"] in ("math", "code")}
    if len({sample["id"] for sample in samples}) == arm.config.rollout.prompts:
        assert sum(row["time/graded_rows"] for row in arm.rows) <= 2 * len(graded) * arm.config.rollout.group
    assert all(row["time/graded_rows"] > 0 and row["time/grading_seconds"] > 0 for row in arm.rows)


def test_sparse_rewards_of_a_random_policy_are_sampled_again_to_the_limit(tmp_path):
    """All wrong: no group has any advantage, so each is tried as often as the config allows, and counted."""
    changes = {"advantage.overlong": "keep", "rollout.max_resample": 2, "steps": 1, "log.rollouts": 32}
    folder = run(sparse(changes), tmp_path / "run")
    row = rows(folder, clock=True)[0]
    assert row["rollout/resampled"] == 2 * 8
    assert row["advantage/live_groups"] == row["reward/mean"] == row["solve/accuracy"] == 0
    assert row["update/without_advantage"] == 1 and row["grad/norm"] is None  # there is nothing to learn from
    assert row["judge/asked"] == 0 and row["judge/parsed"] is None
    sampled = row["time/sample_tokens_per_second"] * row["time/sample_seconds"]
    assert sampled > 2 * row["response/length_mean"] * 32
