"""What an update costs against what it holds: rows, tokens, prompts, segments and devices.

    python -m benchmarks.scaling --output=runs/scaling.json

A small model with random weights (2 layers of width 256), in float32.  One thing changes at a time; `seconds` is the
shortest of three, `turns` how many blocks of keys that block of a packed row attends to which sees most
(`model.blocks`).
Over devices it is not time that is told, for all of them are this machine's cores, but what the compiled update sends:
bytes of the results of its collectives on one device, those in a loop once a microbatch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

DEVICES = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """An update of one microbatch: a group to a packed row."""

    groups: int = 2
    group: int = 8
    prompt: int = 64
    response: int = 64


SWEEPS = {"groups": [1, 2, 4, 8], "response": [32, 64, 128, 256], "prompt": [64, 128, 256, 512], "group": [2, 4, 8, 16]}


def main() -> None:
    """Prints the tables, and writes the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--tiny", action="store_true", help="the first two of each only, to see that it runs")
    parser.add_argument("--of_devices", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.of_devices:
        print(json.dumps(sent(asked.of_devices)))
        return
    count = 2 if asked.tiny else None
    rows = []
    print("| | | tokens | turns | seconds | tokens/s |\n|---|---|---|---|---|---|")
    for name, values in SWEEPS.items():
        for value in values[:count]:
            rows.append(row := {"changed": name, "value": value} | measure(Case(**{name: value})))
            print(
                f"| {name} | {value} | {row['tokens']} | {row['turns']} | {row['seconds']:.3f} | "
                f"{row['tokens'] / row['seconds']:.0f} |",
                flush=True,
            )
    print("\n| devices | all-reduce | all-gather | reduce-scatter | others |\n|---|---|---|---|---|")
    for devices in DEVICES[:count]:
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-m", "benchmarks.scaling", f"--of_devices={devices}"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        rows.append(row := {"devices": devices} | json.loads(done.stdout.splitlines()[-1]))
        named = [row.get(kind, 0) for kind in ("all-reduce", "all-gather", "reduce-scatter")]
        others = sum(value for key, value in row.items() if key != "devices") - sum(named)
        print("| " + " | ".join([str(devices), *(f"{x / 2**20:.2f} MiB" for x in (*named, others))]) + " |", flush=True)
    if asked.output:
        import jax

        machine = {"cores": len(os.sched_getaffinity(0)), "jax": jax.__version__, "seed": 0}
        with open(asked.output, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)


def update_of(case: Case, devices: int = 1) -> tuple[Any, tuple[Any, ...], int, int]:
    """(train step, its arguments, tokens, turns) on a data axis of so many devices."""
    import jax
    import numpy as np

    from configs.smoke import get_config
    from exprl_jax import programs
    from exprl_jax.architecture import Architecture
    from exprl_jax.data.packing import Example, fill_rows
    from exprl_jax.hosts import put_microbatches
    from exprl_jax.mesh import mesh_over
    from exprl_jax.model.attention import packed_turns
    from exprl_jax.model.decoder import Transformer
    from exprl_jax.records import Experience
    from exprl_jax.resolve import resolve
    from exprl_jax.weights.language_model import LanguageModel

    arch = Architecture("llama", False, False, 4096, 256, 704, 2, 8, 4, 32, 1e4, None, 1e-5, True, 8192)
    config = resolve(get_config())
    model = LanguageModel(config.policy, arch, tokenizer=None, source=None)
    mesh = mesh_over(jax.devices()[:devices], devices, 1)
    row_tokens = case.prompt - 1 + case.group * case.response
    updates = dataclasses.replace(config.updates, row_tokens=row_tokens, microbatch=case.groups, logp_chunk=4096)
    config = dataclasses.replace(config, updates=updates)
    random = np.random.default_rng(0)
    prompts = random.integers(0, arch.vocab_size, (case.groups, case.prompt))
    made = random.integers(0, arch.vocab_size, (case.groups, case.group, case.response))
    group_N = np.repeat(np.arange(case.groups), case.group)
    examples = [Example(prompts[p], made[p, g]) for p in range(case.groups) for g in range(case.group)]
    filled = fill_rows(examples, group_N, group_N, (1, case.groups, row_tokens), share=True)
    ones = np.ones((len(examples), case.response), np.float32)
    mask, weight = (filled.spread(x, x.dtype) for x in (ones > 0, ones / ones.size))
    experience = Experience(filled.packed, mask, weight, weight, *(np.zeros_like(weight),) * 3, filled.used)
    bound = programs.build(config, mesh, model)
    params = Transformer(arch, config.policy.execution).init_params(jax.random.key(0), "float32")
    packed = filled.packed
    where = (packed.segment_BT[0], packed.shared_BT[0], packed.position_BT[0])
    turns = packed_turns(*map(jax.numpy.asarray, where), "float32", arch.head_size)
    arguments = bound.init_state(params), (), put_microbatches(mesh, experience)
    return bound.train_step, arguments, int(mask.sum()), int(turns.count.max())


def measure(case: Case) -> dict[str, Any]:
    """Seconds of an update, the least of three."""
    import jax

    step, (state, base, experience), tokens, turns = update_of(case)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, base, experience))
        seconds.append(time.perf_counter() - start)
    return {"tokens": tokens, "turns": turns, "seconds": min(seconds[1:])}


def sent(devices: int) -> Mapping[str, int]:
    """Bytes of the results of collectives on a device, by kind, of an update of 8 groups."""
    step, arguments, *_ = update_of(Case(groups=8), devices)
    found: dict[str, int] = {}
    pattern = r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for shapes, kind in re.findall(pattern, step.lower(*arguments).compile().as_text()):
        for size, dims in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", shapes):
            elements = 1
            for dim in filter(None, dims.split(",")):
                elements *= int(dim)
            found[kind] = found.get(kind, 0) + elements * int(size) // 8
    return found


if __name__ == "__main__":
    main()
