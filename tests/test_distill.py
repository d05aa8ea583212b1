"""Self-distillation end to end, on a tiny model: the signal, the loss, and that a run goes on where it was left."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import (
    ROOT,
    assert_same_parameters,
    assert_same_rows,
    parameters,
    random_batch,
    read_jsonl,
    rows,
    run,
    seen_by,
    take_step,
    tiny,
    write_problems,
)

from exprl_jax import distill
from exprl_jax.batch import pack_update
from exprl_jax.data.prompts import teacher_prompt
from exprl_jax.hosts import put_microbatches
from exprl_jax.learning import distillation, update
from exprl_jax.reward import statistics
from exprl_jax.rl_run import first_state
from exprl_jax.run import loop
from tests.oracles.tiny_decoder import forward_logits

STEPS = 3
KL = ("sampled", "full")
# At a rate at which each update shows.
LIVE = {"steps": STEPS, "updates.row_tokens": 512, "optimizer.learning_rate": 1e-3, "log.rollouts": 32}


def config(kl, changes=None):
    return tiny("distill", LIVE | {"distillation.kl": kl} | (changes or {}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of each kind, uninterrupted, made when first asked for."""
    made = {}

    def get(kl):
        if kl not in made:
            made[kl] = run(config(kl), tmp_path_factory.mktemp(kl) / "run")
        return made[kl]

    return get


@pytest.mark.parametrize("kl", KL)
def test_a_row_holds_every_documented_metric_and_no_other(kl, whole):
    learned = distillation.METRICS if kl == "full" else [*update.METRICS, "distill/kl"]
    of_rollouts = [name for name in statistics.METRICS if name.startswith(("solve/", "response/"))]
    documented = {"step", "data/epoch", "update/skipped_total", "update/padding", *of_rollouts, *learned}
    for row in rows(whole(kl)):
        assert set(row) == documented
        assert row["update/skipped"] == 0 and row["grad/norm"] > 0
        assert row["update/tokens"] == 32 * row["response/length_mean"]
    assert [row["step"] for row in rows(whole(kl))] == list(range(1, STEPS + 1))
    clock = rows(whole(kl), clock=True)[0]
    assert {name for name in clock if name.endswith("_tokens_per_second")} == {
        "time/sample_tokens_per_second",
        "time/train_tokens_per_second",
    }


def test_the_exact_divergence_is_never_negative(whole):
    for row in rows(whole("full")):
        assert row["distill/kl"] > 0 and row["loss/total"] == pytest.approx(row["distill/kl"], rel=1e-5)


@pytest.mark.parametrize("kl", KL)
def test_rollouts_are_written_with_their_references_and_no_scores(kl, whole):
    samples = read_jsonl(whole(kl) / "rollouts" / "step_000001.jsonl")
    assert len(samples) == 32 and len({(sample["id"], sample["rollout"]) for sample in samples}) == 32
    for sample in samples:
        assert sample["reference"] and sample["reference"] not in sample["prompt"]
        (segment,) = sample["segments"]
        tokens, logp, entropy = (segment.pop(f"token_{name}") for name in ("text", "logp", "entropy"))
        assert segment == {"text": sample["response"], "score": None, "advantage": None, "judge": None}
        assert len(tokens) == len(logp) == len(entropy) == sample["length"] and max(logp) <= 0 <= min(entropy)
        assert sample["verdict"] in {str(verdict) for verdict in statistics.VERDICTS}


def test_both_kinds_sample_the_same_first_batch(whole):
    """They differ in what they learn from it."""
    ours, theirs = (read_jsonl(whole(kl) / "rollouts" / "step_000001.jsonl") for kl in KL)
    assert ours == theirs
    ours, theirs = (read_jsonl(whole(kl) / f"rollouts/step_{STEPS:06d}.jsonl") for kl in KL)
    assert ours != theirs


@pytest.fixture(scope="module")
def taught():
    """Rollouts from nowhere as a run with an exact KL packs them, and as its teacher is shown them."""
    with contextlib.ExitStack() as stack:
        distilled = distill.open_distill_run(config("full"), stack)
    run = distilled.run
    batch = random_batch(run)
    shown = [distilled.prompts.ids[problem.id] for problem in run.problems[: len(batch.prompts)]]
    packed = pack_update(run, batch, slice(None), [max(map(len, pair)) for pair in zip(batch.prompts, shown)])
    return distilled, batch, packed, shown, distill.teach(run, batch, packed, shown)


def test_a_teachers_slots_have_the_same_targets_after_its_own_prompts(taught):
    _, batch, packed, shown, teaching = taught
    e = jax.device_get(packed.experience)
    assert teaching.packed.tokens_BT.shape == e.packed.tokens_BT.shape
    ours, theirs = (x.packed.target_BT.reshape(-1, x.packed.target_BT.shape[-1]) for x in (e, teaching))
    at = teaching.at_MBT.reshape(ours.shape)
    for p, g, row, first in zip(packed.group_N, packed.index_N, packed.packed.row_N, packed.packed.first_N):
        n = int(batch.rollouts.mask_PGR[p, g].sum())
        response = batch.rollouts.tokens_PGR[p, g, :n].tolist()
        mine = at[row, first : first + n]
        assert theirs[row, mine].tolist() == ours[row, first : first + n].tolist() == response
        position = teaching.packed.position_BT.reshape(ours.shape)[row, mine]
        assert position.tolist() == list(range(len(shown[p]) - 1, len(shown[p]) - 1 + n))
        for k in {0, n - 1}:
            assert seen_by(teaching.packed, row, mine[k]) == [*shown[p], *response[:k]]


def test_the_exact_divergence_is_that_of_whole_sequences(taught):
    """Every rollout alone, after the policy's prompt and after the teacher's; the gradient's norm too."""
    distilled, batch, packed, shown, teaching = taught
    run = distilled.run
    teacher = run.frozen[run.config.reference]
    params = jax.tree.map(lambda x: x * 1.05, teacher)
    arch, execution, temperature = run.policy.arch, run.policy.execution, run.config.rollout.temperature
    mask = batch.mask_PGR.reshape(-1, batch.mask_PGR.shape[-1])
    responses = batch.rollouts.tokens_PGR.reshape(mask.shape)

    def logp(params, prompts):
        """[P·G, R, V]."""
        prompts = [prompt for prompt in prompts for _ in range(run.config.rollout.group)]
        width = max(map(len, prompts)) + mask.shape[1]
        tokens, first = np.zeros((len(prompts), width), np.int32), np.array([[len(prompt) - 1] for prompt in prompts])
        for row, prompt, response in zip(tokens, prompts, responses):
            row[: len(prompt) + len(response)] = [*prompt, *response]
        logits = forward_logits(params, arch, execution, jnp.asarray(tokens))
        logits = jnp.take_along_axis(logits, (first + np.arange(mask.shape[1]))[..., None], axis=1)
        return jax.nn.log_softmax(logits / temperature)

    @jax.jit
    def whole(params, teacher):
        theirs = logp(teacher, shown)

        def mean(params):
            ours = logp(params, batch.prompts)
            return jnp.where(mask, (jnp.exp(ours) * (ours - theirs)).sum(-1), 0.0).sum() / mask.sum()

        value, gradient = jax.value_and_grad(mean)(params)
        return value, jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient)))

    expected, norm = whole(*jax.device_put((params, teacher), jax.devices()[0]))
    state = run.programs.init_state(params)
    teaching = put_microbatches(run.mesh, teaching)
    _, row = distilled.programs.distill_step(state, (), teacher, teaching, packed.experience)
    assert float(row["distill/kl"]) == pytest.approx(float(expected), rel=1e-4) and expected > 1e-4
    assert float(row["loss/total"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(row["grad/norm"]) == pytest.approx(float(norm), rel=1e-3)
    assert row["update/tokens"] == mask.sum() < batch.rollouts.mask_PGR.sum()


def plain_logp(run, params, prompt, response):
    """log π of each distribution, [R, V], by the plain forward of prompt and response."""
    tokens = jnp.asarray([[*prompt, *response]], jnp.int32)
    logits = forward_logits(params, run.policy.arch, run.policy.execution, tokens)[0, len(prompt) - 1 : -1]
    return np.asarray(jax.nn.log_softmax(logits / run.config.rollout.temperature), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("kl", KL)
def test_the_divergence_is_that_of_the_plain_forward(kl):
    """The teacher is the frozen start after its own prompt; the first batch's numbers, from whole sequences."""
    settings, waves = config(kl, {"rollout.max_tokens": 8, "steps": 1}), []
    with contextlib.ExitStack() as stack:
        distilled = distill.open_distill_run(settings, stack)
        run, sample_wave = distilled.run, distill.sample_wave

        def keep(*arguments):
            waves.append(sample_wave(*arguments))
            return waves[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "sample_wave", keep)
            _, result = take_step(distill, distilled, first_state(run), 0)
    params, total, count = run.frozen[settings.reference], 0.0, 0
    (wave,) = waves
    for i, problem in enumerate(wave.problems):
        for g in range(settings.rollout.group):
            n = int(wave.rollouts.mask_PGR[i, g].sum())
            ids = wave.rollouts.tokens_PGR[i, g, :n]
            ours = plain_logp(run, params, run.prompts.ids[problem.id], ids)
            theirs = plain_logp(run, params, teacher_prompt(run.policy.tokenizer, problem), ids)
            if kl == "full":
                total += (np.exp(ours) * (ours - theirs)).sum()
            else:
                total += (ours - theirs)[np.arange(n), ids].sum()
            count += n
    assert result.row["distill/kl"] == pytest.approx(total / count, abs=2e-5)
    assert abs(total / count) > 1e-4


@pytest.mark.parametrize("kl", KL)
def test_a_run_stopped_at_a_step_goes_on_as_if_it_had_not(kl, whole, tmp_path, monkeypatch, capfd):
    asked = iter([True])
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: next(asked))
    folder = run(config(kl), tmp_path / "run")
    assert [row["step"] for row in rows(folder)] == [1] and not (folder / "export").exists()
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: False)
    run(config(kl), folder)
    assert f"resuming after step 1 of {STEPS}" in capfd.readouterr().err
    assert rows(folder) == rows(whole(kl))
    assert_same_parameters(folder, whole(kl))
    for path in (whole(kl) / "rollouts").iterdir():
        assert (folder / "rollouts" / path.name).read_text() == path.read_text()


@pytest.mark.parametrize("kl", KL)
def test_waves_and_the_mesh_change_nothing(kl, whole, tmp_path):
    changes = {"mesh.data": 4, "mesh.model": 2, "rollout.wave": 4}
    folder = run(config(kl, changes), tmp_path / "run")
    assert_same_rows(rows(folder), rows(whole(kl)), 1e-4)
    for name, tensor in parameters(folder).items():
        np.testing.assert_allclose(tensor, parameters(whole(kl))[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "changes, room",
    [({"rollout.max_tokens": 3500, "updates.row_tokens": 5000}, 596), ({"updates.row_tokens": 700}, 676)],
)
def test_a_problem_whose_reference_leaves_no_room_is_dropped_and_counted(changes, room, tmp_path, capsys):
    """As every other arm does: one long solution must not end the paper's distillation at its start."""
    problems = read_jsonl(ROOT / "configs/data/arithmetic.jsonl")
    problems[3]["reference"] = "Count. " * 100
    source = write_problems(tmp_path / "problems.jsonl", problems)
    with contextlib.ExitStack() as stack:
        distilled = distill.open_distill_run(config("full", {"data.source": source, **changes}), stack)
    kept = {problem.id for problem in distilled.run.problems}
    assert kept == {problem["id"] for problem in problems} - {"arithmetic/03"} == set(distilled.prompts.ids)
    said = f"63 problems; dropped 1 over config.updates.row_tokens less rollout.max_tokens = {room}"
    assert said in capsys.readouterr().err


def test_too_few_problems_left_for_a_batch_is_one_line(tmp_path):
    problems = read_jsonl(ROOT / "configs/data/arithmetic.jsonl")
    for problem in problems[5:]:
        problem["reference"] = "Count. " * 100
    source = write_problems(tmp_path / "problems.jsonl", problems)
    with contextlib.ExitStack() as stack, pytest.raises(ValueError, match="rollout.prompts: got 8, expected at most 5"):
        distill.open_distill_run(config("full", {"data.source": source, "updates.row_tokens": 700}), stack)
