"""The compile check as a whole: the tiny config's programs for 16 chips that are not there, programs that do not fit,
and the door."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_runs import config_dict

from configs.base import QWEN3_4B
from exprl_jax import compile_check
from exprl_jax.kinds import KINDS
from exprl_jax.mesh import mesh_over
from exprl_jax.plan import compiled
from exprl_jax.plan.calls import calls_of
from exprl_jax.plan.chips import GIB, topology
from exprl_jax.plan.compiled import CODE, TEMPORARIES, compile_for, needed_bytes, uncached
from exprl_jax.plan.models import known_model
from exprl_jax.plan.tables import as_text, summary
from exprl_jax.resolve import resolve
from exprl_jax.weights.language_model import PUBLISHED

# The paper's model with everything small but its heads, which the TPU's kernels are made for.
SMALL = dataclasses.replace(
    PUBLISHED[QWEN3_4B], vocab_size=1024, width=256, ffn=512, layers=2, heads=16, kv_heads=8, max_positions=4096
)
COPIED = 2**20
BUDGETS = {
    "data.max_prompt_tokens": 256,
    "rollout.max_tokens": 768,
    "rollout.prompts": 8,
    "rollout.group": 4,
    "judge.max_context_tokens": 512,
    "judge.max_trace_tokens": 1280,
    "judge.max_tokens": 64,
    "updates.row_tokens": 1024,
    "updates.logp_chunk": 512,
}


@pytest.fixture(scope="module", autouse=True)
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, QWEN3_4B, SMALL)
        known_model.cache_clear()
        yield
    known_model.cache_clear()


def small(**changes):
    """configs/stage1.py with little of everything, on 2 x 8."""
    return resolve(config_dict("stage1", "outcome", BUDGETS | changes))


def tiny(arm="text", **changes):
    """The tiny config as an accelerator runs it, on 8 x 2."""
    return resolve(config_dict("tiny", arm, accelerated(arm, changes)))


def accelerated(arm, changes):
    execution = {"scan_layers": True, "compute_dtype": "bfloat16", "remat": "full"}
    models = ("policy",) if arm == "sft" else ("policy", "reference", "judge.model")
    execution = {f"{model}.execution.{key}": value for model in models for key, value in execution.items()}
    return execution | {"mesh.data": 8, "mesh.model": 2} | changes


@pytest.fixture(scope="module")
def report(small_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_LARGE", COPIED)  # small as the model is, so are its copies
        return compile_for(small(), topology("v5e:4x4"), "")


def usage(report, name):
    return next(usage for usage in report.programs if usage.name == name)


def test_every_program_compiles_and_fits(report):
    names = [usage.name for usage in report.programs]
    logp = ["token_logp", "token_logp (reference)"]
    assert names == ["init_state", "all_finite", "prefill", "sample", "judge_prefill", "judge", *logp, "train_step"]
    assert report.fits and all(usage.compiled and not usage.failure for usage in report.programs)
    for usage in report.programs:
        # What is known without the compiler is part of its peak: the rest is its temporaries.
        assert usage.owners[TEMPORARIES] > 0
        assert sum(usage.owners.values()) == usage.needed < report.limit
    assert {usage.owners[CODE] for usage in report.programs} == {report.programs[0].owners[CODE]} != {0}


# MiB at the program's own peak.  What takes a tenth more than it did should be known to.
PEAKS = {
    "init_state": 4.53,
    "all_finite": 1.45,
    "prefill": 4.77,
    "sample": 19.6,
    "judge_prefill": 7.24,
    "judge": 41.6,  # with the closing instruction
    "token_logp": 10.2,
    "token_logp (reference)": 9.60,
    "train_step": 22.5,
}


def test_the_peaks_are_what_they_were(report):
    where = topology("v5e:4x4")
    calls = {call.name: call for call in calls_of(small(), mesh_over(where.devices, 2, 8))}
    beside = {name: sum(call.beside.values()) for name, call in calls.items()}
    peaks = {x.name: (x.needed - x.owners[CODE] - beside[x.name]) / 2**20 for x in report.programs}
    assert peaks == pytest.approx(PEAKS, rel=0.1)


def test_only_the_train_step_gives_its_state_away_and_gets_it_back_in_place(report):
    train = usage(report, "train_step")
    assert train.donated == train.owners["policy"] + train.owners["Adam"] <= train.aliased
    assert [usage.name for usage in report.programs if usage.donated] == ["train_step"]


# What moves anything worth a kilobyte: kinds of collectives and mesh axes.
MOVED = {
    "init_state": set(),
    "all_finite": set(),
    # Weights are gathered along data; tokens along model before each product by columns, and its sums scattered.
    "prefill": {"all-gather data", "all-gather model", "all-to-all data", "reduce-scatter model"},
    # Weights once; then one token a row, which is not sharded, so that sums are everybody's.
    "sample": {"all-gather data", "all-gather model", "all-reduce model", "collective-permute model"},
    "judge_prefill": {"all-gather data", "all-gather data+model", "all-gather model", "reduce-scatter model"},
    "judge": {
        "all-gather data",
        "all-gather model",
        "reduce-scatter model",
        "all-reduce model",
        "collective-permute model",
    },
    "token_logp": {
        "all-gather data",
        "all-gather data+model",
        "all-gather model",
        "reduce-scatter model",
        "all-reduce model",
    },
    "train_step": {
        "all-gather data",
        "all-gather data+model",
        "all-gather model",
        "reduce-scatter model",
        "all-reduce model",
        "all-reduce data",
        "reduce-scatter data",
        "all-reduce data+model",
    },
}


def test_the_programs_move_what_their_sharding_says(report):
    for program in report.programs:
        moved = {name for name, (size, _) in program.moved.items() if size >= 1024}
        assert moved == MOVED[program.name.removesuffix(" (reference)")], program.name
    # No step of decoding gathers weights: along data they are gathered once, however long the responses.
    gathered, times = usage(report, "sample").moved["all-gather data"]
    assert times < 20 and gathered <= usage(report, "sample").owners["policy"]


def test_no_loop_copies_a_cache(report):
    """The pool is written in place: no loop makes an array of a layer's part of it, or larger, anew."""
    for name in ("sample", "judge"):
        assert usage(report, name).owners["KV"] / SMALL.layers > COPIED
        assert usage(report, name).copies == ()


def test_a_step_at_best_is_the_sum_of_its_calls_at_their_slowest(report):
    step = 0
    for program in report.programs:
        step += program.times * max(program.flops / 197e12, program.hbm / 819e9, program.bounds["ICI"])
    assert report.seconds() == pytest.approx(step)
    phases = ("sample", "judge", "logp", "train")
    assert report.seconds() == pytest.approx(sum(report.seconds(phase) for phase in phases))
    (header, _, row), columns = summary([report]).splitlines(), 12
    assert header.count("|") == row.count("|") == columns + 1
    assert row.startswith("| v5e:4x4 | 2 x 8 |  | 15.75 | ") and "| judge | yes |" in row


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_named_with_its_owners_and_its_settings_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(PUBLISHED, QWEN3_4B, dataclasses.replace(SMALL, layers=36))
    known_model.cache_clear()
    sparse = {f"routes.{kind}": "verifier" for kind in KINDS}
    many = {"rollout.max_tokens": 3840, "rollout.group": 128, "updates.row_tokens": 4096, "updates.per_batch": 1}
    report = compile_for(small(**sparse, **many, **{"loss.kl_coef": 0.0}), topology("v5e:4x4"), "")
    known_model.cache_clear()
    sample = usage(report, "sample")
    assert not report.fits and not sample.compiled and sample.needed > report.limit == 15.75 * GIB
    # The pool of pages: 36 layers, 256 rows of 31 pages, key and value of one head of 128 in bfloat16; and the prefix.
    pool = 36 * 256 * 31 * 128 * 2 * 128 * 2
    assert sample.owners["KV"] == pytest.approx(pool, rel=0.01)
    assert usage(report, "prefill").fits and usage(report, "init_state").fits
    text = as_text(report)
    assert re.search(r"sample: out of memory, needs [\d.]+ of 15.75 GiB a device \(KV [\d.]+, ", text)
    assert (
        "  to change: rollout.wave, rollout.slots, rollout.expected_tokens, mesh.model, policy.execution.kv_dtype"
        in text
    )
    assert "| sample | no |  |  |  |  |  |" in summary([report])


SAMPLED, FULL = {"distillation.kl": "sampled"}, {"distillation.kl": "full"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm, changes", [("sft", {}), ("sft", {"lora.rank": 2}), ("distill", SAMPLED), ("distill", FULL)]
)
def test_the_baselines_programs_compile_and_fit(arm, changes):
    report = compile_for(tiny(arm, **changes), topology("v5e:4x4"), "")
    assert report.fits
    assert [usage.name for usage in report.programs if usage.donated] == [report.programs[-1].name]
    assert all(usage.flops > 0 for usage in report.programs if usage.phase != "start")


def test_the_compilers_words_about_memory_are_understood():
    mesh = mesh_over(topology("v5e:4x4").devices, 4, 4)
    large = jax.ShapeDtypeStruct((32, 2**29), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    with uncached(), pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).lower(large).compile()
    assert needed_bytes(str(refused.value)) == pytest.approx(2 * 8 * 2**29 * 4, rel=0.01)
    assert needed_bytes("RESOURCE_EXHAUSTED: something else") is None
    assert needed_bytes("INVALID_ARGUMENT: no") is None


# ml_collections opens config files that way.
LOADS = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@LOADS
@pytest.mark.parametrize(
    "options, status, message",
    [
        (["--topology=v5e:4x4"], 2, "--config and --topology are needed"),
        (["--config=configs/tiny.py"], 2, "--config and --topology are needed"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4+mesh.data"], 2, "expected key=value after each +"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4+mesh.dta=4"], 2, "does not fit the config"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4", "more"], 2, "unexpected argument 'more'"),
        (["--config=configs/tiny.py", "--topology=v5e-16"], 1, "expected <generation>:<shape>"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4+mesh.data=3"], 1, "expected a product of 16"),
        (["--config=configs/tiny.py:sft", "--topology=v5e:4x4+microbatch=3"], 1, "config.microbatch: got 3, expected"),
        (
            ["--config=configs/evaluate.py:tiny", "--topology=v5e:4x4+sampling.wave=7+mesh.data=16"],
            1,
            "config.sampling.wave: got 7",
        ),
        (["--config=configs/calibrate.py:tiny", "--topology=v5e:4x4+wave=7+mesh.data=16"], 1, "config.wave: got 7"),
    ],
)
def test_what_cannot_work_ends_in_one_line(options, status, message, capsys):
    assert compile_check.main(["compile_check", *options]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("exprl_jax.compile_check: ")


@LOADS
@pytest.mark.slow
def test_a_topology_that_takes_too_long_is_given_up_and_one_whose_process_dies_is_said(capsys):
    """A process takes longer than a second for its imports alone."""
    options = ["--config=configs/tiny.py:sparse", "--topology=v5e:2x2,v6e:2x2", "--seconds=1"]
    assert compile_check.main(["compile_check", *options]) == 1
    message = "did not compile within --seconds=1; give it more, or a smaller config"
    expected = [f"exprl_jax.compile_check: {name}: {message}" for name in ("v5e:2x2", "v6e:2x2")]
    assert capsys.readouterr().err.splitlines() == expected
    with pytest.raises(ValueError, match="its process ended with status 1"):
        compile_check._check_apart(None, "v5e:2x2", "", 120.0)  # which it cannot read: a traceback, and no report


@LOADS
@pytest.mark.slow
def test_the_door_checks_several_topologies_each_in_a_process_of_its_own(capfd):
    changes = accelerated("sparse", {"mesh.data": -1, "mesh.model": 2})
    config = [f"--config.{key}={value}" for key, value in changes.items()]
    topologies = "--topology=v5e:2x2,v6e:2x2+mesh.model=1+rollout.max_tokens=16,v5e:4x4+mesh.data=3"
    assert compile_check.main(["compile_check", "--config=configs/tiny.py:sparse", *config, topologies]) == 1
    out, error = capfd.readouterr()
    assert "v5e:2x2, mesh data 2 x model 2: fits" in out
    assert "v6e:2x2, mesh data 4 x model 1, mesh.model=1, rollout.max_tokens=16: fits" in out
    assert [line.split(" | ")[0] for line in out.splitlines()[-3:]] == ["| ---", "| v5e:2x2", "| v6e:2x2"]
    assert "exprl_jax.compile_check: v5e:4x4+mesh.data=3: config.mesh: got data 3 x model 2" in error
