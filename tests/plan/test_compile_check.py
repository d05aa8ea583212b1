"""The compile check as a whole: the tiny config's programs for 16 chips that are not there, programs that do not fit,
and the door."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_runs import config_dict

from configs.base import QWEN3_4B
from exprl_jax import compile_check
from exprl_jax.mesh import mesh_over
from exprl_jax.plan import measure
from exprl_jax.plan.calls import programs_of, residents
from exprl_jax.plan.chips import GIB, topology
from exprl_jax.plan.measure import CODE, TEMPORARIES, needed_bytes, prove, uncached
from exprl_jax.plan.tables import as_text, rewritten
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
        yield


def small(**changes):
    """configs/stage1.py with little of everything, on 2 x 8."""
    return resolve(config_dict("stage1", "outcome", BUDGETS | changes))


def tiny(arm="text", **changes):
    """The tiny config as an accelerator runs it, on 8 x 2."""
    return resolve(config_dict("tiny", arm, accelerated(arm, changes)))


def accelerated(arm, changes):
    how = {"scan_layers": True, "compute_dtype": "bfloat16", "remat": "full"}
    models = ("policy",) if arm == "sft" else ("policy", "reference", "judge.model")
    execution = {f"{model}.execution.{key}": value for model in models for key, value in how.items()}
    return execution | {"mesh.data": 8, "mesh.model": 2} | changes


@pytest.fixture(scope="module")
def proof(small_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_LARGE", COPIED)  # small as the model is, so are its copies
        return prove(small(), topology("v5e:4x4"), "")


def program(proof, name):
    return next(each for each in proof.programs if each.name == name)


def test_every_program_compiles_and_fits(proof):
    names = [each.name for each in proof.programs]
    logp = ["token_logp", "token_logp (reference)"]
    assert names == ["init_state", "prefill", "sample", "judge_prefill", "judge", *logp, "train_step"]
    assert proof.fits and all(each.compiled and not each.failure for each in proof.programs)
    for each in proof.programs:
        within = sum(size for name, size in each.owners.items())
        assert within == pytest.approx(each.total, abs=1) and each.owners[TEMPORARIES] >= 0
        assert 0 < each.peak <= each.total < proof.limit


# MiB at the peak.  What takes a tenth more than it did should be known to.
PEAKS = {
    "init_state": 4.53,
    "prefill": 4.77,
    "sample": 19.6,
    "judge_prefill": 7.24,
    "judge": 37.6,
    "token_logp": 10.2,
    "token_logp (reference)": 9.60,
    "train_step": 22.5,
}


def test_the_peaks_are_what_they_were(proof):
    found = {each.name: each.peak / 2**20 for each in proof.programs}
    assert found == pytest.approx(PEAKS, rel=0.1)


def test_the_code_of_all_programs_lies_beside_each(proof):
    code = sum(each.code for each in proof.programs)
    assert {each.owners[CODE] for each in proof.programs} == {code} and min(each.code for each in proof.programs) > 0


def test_only_the_train_step_gives_its_state_away_and_gets_it_back_in_place(proof):
    train = program(proof, "train_step")
    assert train.donated > 0 and train.aliased >= train.donated
    assert [each.name for each in proof.programs if each.donated] == ["train_step"]


# What moves anything worth a kilobyte: kinds of collectives and mesh axes.
MOVED = {
    "init_state": set(),
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


def test_the_programs_move_what_their_sharding_says(proof):
    for each in proof.programs:
        moved = {name for name, (size, _) in each.moved.items() if size >= 1024}
        assert moved == MOVED[each.name.removesuffix(" (reference)")], each.name
    # No step of decoding gathers weights: along data they are gathered once, however long the responses.
    gathered, times = program(proof, "sample").moved["all-gather data"]
    assert times < 20 and gathered <= program(proof, "sample").owners["policy"]


def test_no_loop_copies_a_cache(proof):
    """The pool is written in place: no loop makes an array of a layer's part of it, or larger, anew."""
    for name in ("sample", "judge"):
        assert program(proof, name).owners["KV"] / SMALL.layers > COPIED
        assert program(proof, name).copies == ()


def test_a_step_at_best_is_the_sum_of_its_calls_at_their_slowest(proof):
    step = 0
    for each in proof.programs:
        step += each.each_step * max(each.flops / 197e12, each.hbm / 819e9, each.bounds["ICI"])
    assert proof.seconds() == pytest.approx(step)
    assert proof.seconds() == pytest.approx(sum(proof.seconds(phase) for phase in ("sample", "judge", "logp", "train")))


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_named_with_its_buffers_and_its_settings_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(PUBLISHED, QWEN3_4B, dataclasses.replace(SMALL, layers=36))
    sparse = dict.fromkeys(("routes.math", "routes.choice", "routes.science", "routes.code"), "verifier")
    many = {"rollout.max_tokens": 3840, "rollout.group": 128, "updates.row_tokens": 4096, "updates.per_batch": 1}
    proof = prove(small(**sparse, **many, **{"loss.kl_coef": 0.0}), topology("v5e:4x4"), "")
    sample = program(proof, "sample")
    assert not proof.fits and not sample.compiled and sample.exhausted.needed > proof.limit == 15.75 * GIB
    assert "rollout.wave" in sample.exhausted.settings
    # The pool of pages: 36 layers, 256 rows of 31 pages, key and value of one head of 128 in bfloat16.
    pool = 36 * 256 * 31 * 128 * 2 * 128 * 2
    sizes = [float(buffer.split(" ")[0]) for buffer in sample.exhausted.buffers]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] * GIB == pytest.approx(pool, rel=0.01)
    assert any(re.match(r"[\d.]+ GiB \w+\[[\d,]+\] jit\(sample\)/while", each) for each in sample.exhausted.buffers)
    assert program(proof, "prefill").compiled and program(proof, "init_state").compiled
    text = as_text(proof)
    assert re.search(r"sample: out of memory, needs [\d.]+ of 15.75 GiB a device", text)
    assert "to change: rollout.wave, mesh.model" in text


def test_what_a_run_holds_lies_beside_every_program():
    config, where = tiny("mixed"), topology("v5e:4x4")
    mesh = mesh_over(where.devices, 8, 2)
    held, calls = residents(config, mesh), {call.name: call for call in programs_of(config, mesh)}
    # The judge is another model than the reference here: two frozen copies.
    assert set(held) == {"policy", "Adam", "frozen reference", "frozen judge"}
    assert held["Adam"] == pytest.approx(2 * held["policy"], rel=0.01)
    assert set(calls["sample"].beside) == {"Adam", "frozen reference", "frozen judge"}
    assert set(calls["judge"].beside) == {"policy", "Adam", "frozen reference"}
    assert set(calls["train_step"].beside) == {"frozen reference", "frozen judge", "batch"}
    # Scores of prefixes: as many judge calls a wave as a rollout has segments.
    assert calls["judge"].each_step == config.segments.max_segments * calls["judge_prefill"].each_step


def test_updates_that_wait_lie_beside_the_one_at_work():
    mesh = mesh_over(topology("v5e:4x4").devices, 4, 4)
    four = {"mesh.data": 4, "mesh.model": 4}
    one, two = (
        {call.name: call for call in programs_of(tiny(**four, **{"updates.per_batch": n}), mesh)} for n in (1, 2)
    )
    assert one["train_step"].beside["batch"] == 0 < two["train_step"].beside["batch"]
    assert "token_logp" not in one and two["token_logp"].each_step == two["train_step"].each_step == 2


# Arm, changes, programs, frozen models, and what lies beside the update.
SAMPLED, FULL = {"distillation.kl": "sampled"}, {"distillation.kl": "full"}
BASELINES = [
    ("sft", {}, ["init_state", "sft_step"], set(), set()),
    ("sft", {"lora.rank": 2}, ["init_state", "sft_step"], {"frozen base"}, set()),
    (
        "distill",
        SAMPLED,
        ["init_state", "prefill", "sample", "teacher_signal", "train_step"],
        {"frozen teacher"},
        {"frozen teacher", "batch"},
    ),
    ("distill", FULL, ["init_state", "prefill", "sample", "distill_step"], {"frozen teacher"}, set()),
]


@pytest.mark.parametrize("arm, changes, names, frozen, beside", BASELINES)
def test_the_baselines_programs_take_what_they_are_given(arm, changes, names, frozen, beside):
    config, mesh = tiny(arm, **changes), mesh_over(topology("v5e:4x4").devices, 8, 2)
    calls = programs_of(config, mesh)
    assert [call.name for call in calls] == names
    assert set(residents(config, mesh)) == {"policy", "Adam"} | frozen and set(calls[-1].beside) == beside
    for call in calls:
        if call.phase == "train":
            made = call.program.trace(*(tree for _, tree in call.arguments)).out_info[0]
            given = call.arguments[0][1] if call.name.endswith("step") else call.arguments[-1][1].weight_MBT
            shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, given)]
            assert shapes[0] == shapes[1], call.name


@pytest.mark.slow
@pytest.mark.parametrize("arm, changes, names", [each[:3] for each in BASELINES])
def test_the_baselines_programs_compile_and_fit(arm, changes, names):
    proof = prove(tiny(arm, **changes), topology("v5e:4x4"), "")
    assert proof.fits and [each.name for each in proof.programs] == names
    assert [each.name for each in proof.programs if each.donated] == names[-1:]
    assert all(each.flops > 0 for each in proof.programs if each.phase != "start")


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
    "options, status, said",
    [
        (["--topology=v5e:4x4"], 2, "--config and --topology are needed"),
        (["--config=configs/tiny.py"], 2, "--config and --topology are needed"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4+mesh.data"], 2, "expected key=value after each +"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4+mesh.dta=4"], 2, "does not fit the config"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4", "more"], 2, "unexpected argument 'more'"),
        (["--config=configs/tiny.py", "--topology=v5e-16"], 1, "expected <generation>:<shape>"),
        (["--config=configs/tiny.py", "--topology=v5e:4x4+mesh.data=3"], 1, "expected a product of 16"),
        (["--config=configs/tiny.py:sft", "--topology=v5e:4x4+microbatch=3"], 1, "config.microbatch: got 3 rows"),
        (
            ["--config=configs/evaluate.py:tiny", "--topology=v5e:4x4+sampling.wave=7+mesh.data=16"],
            1,
            "config.sampling.wave: got 7",
        ),
        (
            ["--config=configs/calibrate.py:smoke", "--topology=v5e:4x4"],
            1,
            "expected one of 'rl', 'distill', 'sft', 'evaluate'",
        ),
    ],
)
def test_what_cannot_work_ends_in_one_line(options, status, said, capsys):
    assert compile_check.main(["compile_check", *options]) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("exprl_jax.compile_check: ")


@LOADS
@pytest.mark.slow
def test_the_door_checks_several_topologies_and_writes_json_and_a_page(tmp_path, capfd):
    page, output = tmp_path / "pods.md", tmp_path / "pods.json"
    page.write_text("# Pods\n\nBefore.\n\n<!-- compile_check: begin -->\nold\n<!-- compile_check: end -->\n\nAfter.\n")
    changes = [
        f"--config.{key}={value}" for key, value in accelerated("sparse", {"mesh.data": -1, "mesh.model": 2}).items()
    ]
    status = compile_check.main(
        [
            "compile_check",
            "--config=configs/tiny.py:sparse",
            *changes,
            f"--document={page}",
            f"--output={output}",
            "--topology=v5e:2x2,v6e:2x2+mesh.model=1+rollout.max_tokens=16",
        ]
    )
    assert status == 0
    proofs = json.loads(output.read_text())["proofs"]
    assert [(p["topology"], p["data"], p["model"]) for p in proofs] == [("v5e:2x2", 2, 2), ("v6e:2x2", 4, 1)]
    text = page.read_text()
    assert text.startswith("# Pods\n\nBefore.\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert "## v6e:2x2, mesh data 4 x model 1, mesh.model=1, rollout.max_tokens=16: fits" in text
    assert "v5e:2x2, mesh data 2 x model 2: fits" in capfd.readouterr().out


def test_a_page_keeps_what_is_not_between_the_markers():
    begin, end = "<!-- compile_check: begin -->", "<!-- compile_check: end -->"
    once = rewritten("# Title\n\nWords.\n", "command", [])
    assert once.startswith(f"# Title\n\nWords.\n\n{begin}\n") and once.endswith(f"{end}\n")
    assert rewritten(once, "command", []) == once
    assert rewritten("", "command", []).startswith(begin)
