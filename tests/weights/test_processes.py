"""Loading and exporting with the parameters spread over two processes."""

import json
import pathlib
import socket
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from oracles import torch_models

WORKER = """
import json, pathlib, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address, process, folder, out, scan = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
from jax.sharding import NamedSharding, PartitionSpec
from exprl_jax.weights import folder as weights
from exprl_jax.config import Execution
from exprl_jax.model.decoder import Transformer
from exprl_jax.weights.sources import resolve_model

class Tokenizer:
    vocab_size, bos_id, pad_id, eos_ids = 90, None, 3, (5,)
    def save(self, folder):
        assert jax.process_index() == 0
        (folder / "tokenizer_config.json").write_text("{}")

class Spy:
    def __init__(self, array):
        self.array, self.shape = array, array.shape
    def __getitem__(self, index):
        part = self.array[index]
        asked.append(part.size)
        return part

asked = []
opened = weights._open_folder
weights._open_folder = lambda source: {name: Spy(array) for name, array in opened(source).items()}
execution = Execution(scan_layers=scan == "scanned", compute_dtype="float32", remat="none", kv_dtype="compute")
source = resolve_model(folder)
arch = weights.read_architecture(source)
mesh = jax.make_mesh((8,), ("data",))

def spec(leaf):
    fits = [axis for axis, size in enumerate(leaf.shape) if size % 8 == 0]
    return NamedSharding(mesh, PartitionSpec(*[None] * fits[0], "data") if fits else PartitionSpec())

shardings = jax.tree.map(spec, Transformer(arch, execution).abstract_params("float32"))
params = weights.load_params(source, arch, execution, "float32", shardings)
weights.export_folder(params, arch, execution, out, Tokenizer(), "float32", shard_bytes=20_000)
print(json.dumps({"asked": sum(asked), "parameters": arch.parameters}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_two_processes_read_their_halves_and_export_the_whole(layout, tmp_path):
    folder = torch_models.save(torch_models.tiny_model("qwen3"), tmp_path / "in")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(process), str(folder), str(tmp_path / "out"), layout],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs[0][1][-2000:] + outputs[1][1][-2000:]
    for out, _ in outputs:
        report = json.loads(out.splitlines()[-1])
        # Half of everything, and the few leaves that no device count divides.
        assert 0.5 <= report["asked"] / report["parameters"] < 0.52
    expected, got = safetensors.torch.load_file(folder / "model.safetensors"), {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        got |= safetensors.torch.load_file(path)
    assert expected.keys() == got.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    assert not list(tmp_path.glob(".*"))
