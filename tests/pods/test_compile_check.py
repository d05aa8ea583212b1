"""The compile check as a whole: the tiny config's programs for 16 chips that are not there, programs that do not fit, and
the door."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from exprl_jax import compile_check
from exprl_jax.config import resolve
from exprl_jax.pods.calls import programs_of, residents
from exprl_jax.pods.chips import GIB, mesh_over, topology
from exprl_jax.pods.measure import TEMPORARIES, needed_bytes, prove, uncached
from exprl_jax.pods.tables import as_text, rewritten
from tiny_runs import config_dict


def tiny(arm="text", **changes):
    """The tiny config as an accelerator runs it, on 8 x 2."""
    return resolve(config_dict("tiny", arm, accelerated(arm, changes)))


def accelerated(arm, changes):
    how = {"scan_layers": True, "compute_dtype": "bfloat16", "remat": "full"}
    models = ("policy", "reference", "judge.model")
    execution = {f"{model}.execution.{key}": value for model in models for key, value in how.items()}
    return execution | {"mesh.data": 8, "mesh.model": 2} | changes


@pytest.fixture(scope="module")
def proof():
    return prove(tiny(), topology("v5e:4x4"), "")


def program(proof, name):
    return next(each for each in proof.programs if each.name == name)


@pytest.mark.slow
def test_every_program_of_the_tiny_config_compiles_and_fits(proof):
    names = [each.name for each in proof.programs]
    assert names == ["init_state", "prefill", "sample", "judge_prefill", "judge", "token_logp (reference)", "train_step"]
    assert proof.fits and all(each.compiled and not each.failure for each in proof.programs)
    for each in proof.programs:
        within = sum(size for name, size in each.owners.items())
        assert within == pytest.approx(each.total, abs=1) and each.owners[TEMPORARIES] >= 0
        assert 0 < each.peak <= each.total < proof.limit


@pytest.mark.slow
def test_only_the_train_step_gives_its_state_away_and_gets_it_back_in_place(proof):
    train = program(proof, "train_step")
    assert train.donated > 0 and train.aliased >= train.donated
    assert [each.name for each in proof.programs if each.donated] == ["train_step"]


@pytest.mark.slow
def test_the_programs_move_what_their_sharding_says(proof):
    """Weights are gathered along data by all but the first, and sums along data are the update's alone."""
    moved = {each.name: each.moved for each in proof.programs}
    assert moved.pop("init_state") == {}
    assert all("all-gather data" in kinds for kinds in moved.values())

    def summed(kinds):
        return sum(size for name, (size, _) in kinds.items() if name in ("all-reduce data", "reduce-scatter data"))

    gradient = program(proof, "train_step").owners["policy"]
    assert summed(moved.pop("train_step")) > gradient > 10 * max(map(summed, moved.values()))


@pytest.mark.slow
def test_a_loop_of_a_tiny_program_copies_no_cache(proof):
    assert not any(each.copies for each in proof.programs)


@pytest.mark.slow
def test_a_step_at_best_is_the_sum_of_its_calls_at_their_slowest(proof):
    step = 0
    for each in proof.programs:
        step += each.each_step * max(each.flops / 197e12, each.hbm / 819e9, each.bounds["ICI"])
    assert proof.seconds() == pytest.approx(step)
    assert proof.seconds() == pytest.approx(sum(proof.seconds(phase) for phase in ("sample", "judge", "logp", "train")))


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_named_with_its_buffers_and_its_settings_and_the_others_go_on():
    proof = prove(tiny("outcome", **{"rollout.max_tokens": 3200, "rollout.group": 16384}), topology("v5e:4x4"), "")
    sample = program(proof, "sample")
    assert not proof.fits and not sample.compiled and sample.exhausted.needed > proof.limit == 15.75 * GIB
    assert "rollout.wave" in sample.exhausted.settings
    assert re.match(r"[\d.]+ GiB \w+\[[\d,]+\] jit\(sample\)", sample.exhausted.buffers[0])
    assert program(proof, "prefill").compiled and program(proof, "init_state").compiled
    text = as_text(proof)
    assert re.search(r"sample: out of memory, needs [\d.]+ of 15.75 GiB a device", text)
    assert "to change: rollout.wave, mesh.model" in text


def test_what_a_run_holds_lies_beside_every_program():
    config, where = tiny("mixed"), topology("v5e:4x4")
    mesh = mesh_over(where, 8, 2)
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
    mesh = mesh_over(topology("v5e:4x4"), 4, 4)
    four = {"mesh.data": 4, "mesh.model": 4}
    one, two = (
        {call.name: call for call in programs_of(tiny(**four, **{"updates.per_batch": n}), mesh)} for n in (1, 2)
    )
    assert one["train_step"].beside["batch"] == 0 < two["train_step"].beside["batch"]
    assert "token_logp" not in one and two["token_logp"].each_step == two["train_step"].each_step == 2


def test_the_compilers_words_about_memory_are_understood():
    mesh = mesh_over(topology("v5e:4x4"), 4, 4)
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
        (["--config=configs/tiny.py:sft", "--topology=v5e:4x4"], 1, "expected 'rl'"),
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
    changes = [f"--config.{key}={value}" for key, value in accelerated("sparse", {"mesh.data": -1, "mesh.model": 2}).items()]
    status = compile_check.main(
        [
            "compile_check", "--config=configs/tiny.py:sparse", *changes, f"--document={page}", f"--output={output}",
            "--topology=v5e:2x2,v6e:2x2+mesh.model=1+rollout.max_tokens=16",
        ]
    )  # fmt: skip
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
