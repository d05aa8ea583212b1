"""The description of a run's calls: against what runs give their programs, and what lies beside each."""

import contextlib

import jax
import pytest
from jax.sharding import AbstractMesh
from tiny_runs import LIVELY, ROOT, config_dict, read_jsonl, run, write_problems

from exprl_jax import programs
from exprl_jax.evaluation.annotate import annotate
from exprl_jax.evaluation.calibrate import calibrate
from exprl_jax.evaluation.evaluate import evaluate
from exprl_jax.mesh import make_mesh
from exprl_jax.plan.calls import calls_of
from exprl_jax.plan.memory import residents
from exprl_jax.plan.records import Result
from exprl_jax.resolve import resolve
from exprl_jax.sft import sft

MESH = {"mesh.data": 4, "mesh.model": 2}
SLOW = pytest.mark.slow


def config_of(name, arm, changes=None):
    """A committed config on 4 x 2."""
    return resolve(config_dict(name, arm, MESH | (changes or {})))


def calls_on(config, data=4, model=2):
    return {call.name: call for call in calls_of(config, AbstractMesh((data, model), ("data", "model")))}


@contextlib.contextmanager
def recorded():
    """The shapes of the arguments of every call of a program, by the program's name."""
    calls, jit = {}, programs._jit

    def recording(name, *definition, **options):
        program = jit(name, *definition, **options)

        def call(*arguments):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arguments)
            calls.setdefault(name, []).append(shapes)
            return program(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_jit", recording)
        yield calls


@pytest.mark.parametrize(
    "name, arm, changes",
    [
        ("tiny", "text", {"updates.per_batch": 2, "rollout.wave": 4, "routes.math": "process"}),
        pytest.param("tiny", "lora", {}, marks=SLOW),
        pytest.param("tiny", "distill", {"distillation.kl": "full"}, marks=SLOW),
        pytest.param("tiny", "distill", {"distillation.kl": "sampled"}, marks=SLOW),
        ("tiny", "sft", {"epochs": 1, "batch": 64, "microbatch": 64}),
        pytest.param("evaluate", "tiny", {"sampling.samples": 4}, marks=SLOW),
    ],
)
def test_a_run_calls_what_is_described(name, arm, changes, tmp_path):
    """One step: every program with such trees, dtypes, shardings and, but for widths that the data give, shapes; as
    often as is said; of the judge at most so often, which is asked nothing about what is not to be scored."""
    if name == "tiny":
        changes = {key: value for key, value in LIVELY.items() if arm != "sft" or key.startswith("data.")} | changes
        changes |= {"steps": 1} if arm != "sft" else {}
    config = config_of(name, arm, changes | {"data.source": str(ROOT / "configs/data/arithmetic.jsonl")})
    with recorded() as calls:
        {"sft": sft, "evaluate": evaluate}.get(config.task, run)(config, str(tmp_path / "run"))
    described = calls_of(config, make_mesh(config.mesh))
    assert {call.name.partition(" ")[0] for call in described} == calls.keys()
    for program, made in calls.items():
        planned = [call for call in described if call.name.partition(" ")[0] == program]
        # A step of an evaluation is a wave, of which its 64 problems make 8.
        times = sum(call.times for call in planned) * (8 if name == "evaluate" else 1)
        fewer, more = planned[0].phase == "judge", planned[0].phase == "start"
        assert len(made) == times or fewer and 0 < len(made) < times or more and len(made) > 0, (program, len(made))
        for arguments in made:
            for given, (_, tree) in zip(arguments, planned[0].arguments, strict=True):
                if isinstance(tree, Result):
                    continue
                assert jax.tree.structure(given) == jax.tree.structure(tree), program
                for real, plan in zip(jax.tree.leaves(given), jax.tree.leaves(tree)):
                    assert real.dtype == plan.dtype and real.ndim == plan.ndim, program
                    assert real.shape[:-1] == plan.shape[:-1], program
                    assert real.shape[-1:] <= plan.shape[-1:], (program, real.shape, plan.shape)
                    assert real.sharding.is_equivalent_to(plan.sharding, real.ndim), program


def laid_out_alike(given, planned):
    """Whether a call's arguments are of planned trees, dtypes and shapes, and no wider."""
    if len(given) != len(planned):
        return False
    for tree, plan in zip(given, planned):
        if isinstance(plan, Result):
            continue
        if jax.tree.structure(tree) != jax.tree.structure(plan):
            return False
        for real, shape in zip(jax.tree.leaves(tree), jax.tree.leaves(plan)):
            if real.dtype != shape.dtype or real.shape[:-1] != shape.shape[:-1] or real.shape[-1:] > shape.shape[-1:]:
                return False
    return True


@pytest.mark.parametrize("task", [pytest.param("calibrate", marks=SLOW), "annotate"])
def test_what_asks_about_fixed_rollouts_calls_what_is_described(task, tmp_path):
    lines = read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:8]
    row = {"kind": "math", "domain": "math", "response": "It is so, or so, or so: 3.", "verdict": "wrong"}
    source = write_problems(tmp_path / "rollouts.jsonl", [line | row | {"id": f"p{n}"} for n, line in enumerate(lines)])
    config = config_of(task, "tiny", {"rollouts": source, "data.source": ""})
    with recorded() as calls:
        {"calibrate": calibrate, "annotate": annotate}[task](config, str(tmp_path / "run"))
    described = calls_of(config, make_mesh(config.mesh))
    assert {call.name.partition(" ")[0] for call in described} == calls.keys()
    met = set()
    for program, made in calls.items():
        planned = [call for call in described if call.name.partition(" ")[0] == program]
        for arguments in made:
            alike = [call.name for call in planned if laid_out_alike(arguments, [tree for _, tree in call.arguments])]
            assert alike, program
            met |= set(alike)
    assert met == {call.name for call in described}


def test_of_judges_behind_endpoints_nothing_is_planned():
    elsewhere = {
        "annotator.backend": "openai",
        "annotator.endpoint.base_url": "http://x/v1",
        "annotator.endpoint.model": "m",
    }
    assert calls_on(config_of("annotate", "tiny", elsewhere)) == {}
    local = config_of("calibrate", "tiny", {"prefixes.rollouts": 0, "repeats.rollouts": 0})
    names = list(calls_on(local))
    assert names == [
        f"{program} ({name}{order})"
        for name in ("logits", "text")
        for order in ("", ", reference last")
        for program in ("judge_prefill", "judge")
    ]
    # A reference after the trace makes rows wider by as much as a prompt may have.
    first, last = calls_on(local)["judge (logits)"], calls_on(local)["judge (logits, reference last)"]
    widths = [call.arguments[2][1].tokens_PGT.shape[-1] for call in (first, last)]
    assert 96 < widths[0] < 96 + 512 and widths[1] == 96 + 2048


def test_what_a_run_keeps_lies_beside_every_program():
    config = config_of("tiny", "mixed")
    resident, calls = residents(config, AbstractMesh((4, 2), ("data", "model"))), calls_on(config)
    # The judge is another model than the reference here: two frozen copies.
    assert set(resident) == {"policy", "Adam", "frozen reference", "frozen judge"}
    assert resident["Adam"] == pytest.approx(2 * resident["policy"], rel=0.01)
    assert set(calls["sample"].beside) == {"Adam", "frozen reference", "frozen judge"}
    assert set(calls["judge_branches"].beside) == {"policy", "Adam", "frozen reference"}
    assert set(calls["train_step"].beside) == {"frozen reference", "frozen judge", "batch"}
    # A state is made of the policy's start, which stays where the run has it as a frozen model.
    assert set(calls["init_state"].beside) == {"frozen judge"}
    # Scores of prefixes: one row a rollout, or, of steps, as many judge calls a wave as a rollout has segments.
    assert calls["judge_branches"].times == calls["judge_prefill"].times
    steps = calls_on(config_of("tiny", "mixed", {"judge.unit": "step"}))
    assert steps["judge"].times == config.segments.max_segments * steps["judge_prefill"].times


def test_the_papers_update_can_be_traced_at_its_size():
    """Four billion parameters: their number is no int32."""
    call = calls_on(resolve(config_dict("stage1", "outcome")), 2, 8)["train_step"]
    state, metrics = call.program.trace(*(tree for _, tree in call.arguments)).out_info
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 4_022_468_096 and metrics["update/moved"].shape == ()


def test_keys_and_values_are_divided_over_problems_and_heads():
    """By hand, of the paper's 4B: 36 layers, 8 heads of 128, keys and values in bfloat16; 4 problems with 10 rows each.
    A context is kept once; the rows' cache is input and output of the scan over layers."""
    token = 36 * 8 * 128 * 2 * 2
    contexts, rows = 4 * 4096 * token, 2 * 40 * 16_384 * token
    config = resolve(config_dict("stage1", "outcome"))
    for data, model, shards in ((2, 8, 16), (4, 4, 16), (1, 16, 1)):  # 8 heads do not divide over 16
        sample = calls_on(config, data, model)["sample"]
        prefix = next(tree for owner, tree in sample.arguments if owner == "KV")
        assert (prefix.bytes, sample.inside["KV"]) == (contexts // shards, rows // shards)


def test_slots_bound_the_rows_keys_and_values_and_take_turns():
    """By hand, of the same: a shard's 2 x 10 rows in 8 slots take three turns; a cache of 16k tokens a slot, or pages
    of 128 for 4k tokens of each and the contexts besides, written in place."""
    token = 36 * 8 * 128 * 2 * 2 // 8  # of one device's head
    plain, queued, paged, enough = (
        calls_on(resolve(config_dict("stage1", "outcome", changes)), 2, 8)["sample"]
        for changes in (
            {},
            {"rollout.slots": 8},
            {"rollout.slots": 8, "rollout.expected_tokens": 4096},
            {"rollout.slots": 20},
        )
    )
    assert (plain.steps, queued.steps, paged.steps) == (16_384, 3 * 16_384, 3 * 16_384)
    # A scan over layers takes a cache and gives one.
    assert plain.inside["KV"] == 2 * 20 * 16_384 * token and queued.inside["KV"] == 2 * 8 * 16_384 * token
    # A row's pages begin within one: 127 tokens of its context may stand before its own.
    assert paged.inside["KV"] == (2 * 4096 + 8 * 33 * 128) * token
    assert queued.cost.flops == plain.cost.flops and queued.cost.bytes > plain.cost.bytes
    assert (enough.steps, enough.inside, enough.cost) == (plain.steps, plain.inside, plain.cost)


def test_updates_that_wait_lie_beside_the_one_at_work():
    one, two = (calls_on(config_of("tiny", "text", {"updates.per_batch": n})) for n in (1, 2))
    assert one["train_step"].beside["batch"] == 0 < two["train_step"].beside["batch"]
    assert "token_logp" not in one and two["token_logp"].times == two["train_step"].times == 2


# Arm, changes, programs, frozen models, and what lies beside the update.
SAMPLED, FULL = {"distillation.kl": "sampled"}, {"distillation.kl": "full"}
ROLLOUT = ["init_state", "all_finite", "prefill", "sample"]
BASELINES = [
    ("sft", {}, ["init_state", "all_finite", "sft_step"], set(), set()),
    ("sft", {"lora.rank": 2}, ["init_state", "all_finite", "sft_step"], {"frozen base"}, set()),
    ("distill", SAMPLED, [*ROLLOUT, "teacher_signal", "train_step"], {"frozen teacher"}, {"frozen teacher", "batch"}),
    ("distill", FULL, [*ROLLOUT, "distill_step"], {"frozen teacher"}, set()),
]


@pytest.mark.parametrize("arm, changes, names, frozen, beside", BASELINES)
def test_the_baselines_programs_take_what_they_are_given(arm, changes, names, frozen, beside):
    config = config_of("tiny", arm, changes)
    calls, mesh = list(calls_on(config).values()), AbstractMesh((4, 2), ("data", "model"))
    assert [call.name for call in calls] == names
    assert set(residents(config, mesh)) == {"policy", "Adam"} | frozen and set(calls[-1].beside) == beside
    for call in calls:
        if call.phase == "train":
            made = call.program.trace(*(tree for _, tree in call.arguments)).out_info[0]
            given = call.arguments[0][1] if call.name.endswith("step") else call.arguments[-1][1].weight_MBT
            shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, given)]
            assert shapes[0] == shapes[1], call.name


@pytest.mark.parametrize(
    "name, arm, changes, message",
    [
        ("calibrate", "tiny", {"wave": 6}, "config.wave: got 6, expected a multiple of mesh.data = 4"),
        ("calibrate", "tiny", {"prefixes.sampling.wave": 6}, "config.prefixes.sampling.wave: got 6, expected"),
        ("calibrate", "tiny", {"judges.text.max_trace_tokens": 4096}, "the judge's context length"),
        ("annotate", "tiny", {"wave": 6}, "config.wave: got 6, expected a multiple of mesh.data = 4"),
        ("annotate", "tiny", {"annotator.wave": 4}, "config.annotator.wave: got 4, expected 0: the task has a wave"),
        ("calibrate", "tiny", {"judges.text.wave": 4}, "config.judges.text.wave: got 4, expected 0: the task has"),
        ("tiny", "process", {"judge.wave": 2}, "config.judge.wave: got 2, expected a multiple of mesh.data = 4"),
        ("tiny", "sft", {"microbatch": 3}, "config.microbatch: got 3, expected a multiple of mesh.data = 4"),
        ("evaluate", "tiny", {"sampling.wave": 7}, "config.sampling.wave: got 7"),
    ],
)
def test_what_could_not_run_is_not_described(name, arm, changes, message):
    with pytest.raises(ValueError, match=message):
        calls_on(config_of(name, arm, changes))
