"""What can be said of GPUs without one: the benchmark runs, and every program lowers for CUDA."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import ROOT, environment

from exprl_jax.model.decoder import Transformer
from exprl_jax.records import Context, Draw, Rows
from exprl_jax.rollout.sampler import sample
from tests.oracles.tiny_decoder import QWEN3, make_execution


def test_the_benchmark_runs_and_writes_its_tables(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", f"--output={tmp_path / 'gpu.md'}"],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| tiny")]
    assert len(rows) == 2 and all(0 < int(row.split("|")[-2].strip(" %")) for row in rows)
    assert all(line in done.stdout for line in rows)


@pytest.mark.parametrize("kv_dtype", ["compute", "int8"])
def test_sampling_lowers_for_cuda(kv_dtype):
    """No TPU kernel is in the way; whether it runs is for a GPU to say."""
    execution, P, G, C = make_execution(scan_layers=True, dtype="bfloat16", kv_dtype=kv_dtype), 2, 3, 5
    params = Transformer(QWEN3, execution).abstract_params("bfloat16")

    def sampled(params, context, rows, draw):
        prefix = Transformer(QWEN3, execution).prefill(params, context)
        return sample(Transformer(QWEN3, execution), params, prefix, rows, draw, max_tokens=4, eos_ids=(1,), pad_id=0)

    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    context, rows = Context(shape(P, C), shape(P)), Rows(shape(P, G, 1), shape(P, G))
    draw = Draw(
        shape(dtype=jnp.uint32), shape(), shape(P, dtype=jnp.uint32), shape(P, G, dtype=jnp.float32), shape(P, G)
    )
    text = jax.jit(sampled).trace(params, context, rows, draw).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" in text and "tpu_custom_call" not in text
