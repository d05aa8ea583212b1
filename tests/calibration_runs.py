"""Small calibrations: rollouts from nowhere, and judges behind a stub of an endpoint."""

import json

from tiny_runs import ROOT, config_dict, read_jsonl

from exprl_jax.config import Calibrate
from exprl_jax.resolve import resolve


def write_rollouts(
    path, *, verdict=lambda i, g: "correct" if (i + g) % 2 else "wrong", reference=True, problems=4, group=3
):
    """Rollouts of some arithmetic problems, with a verdict that is a function of problem and number."""
    rows = []
    for i, problem in enumerate(read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:problems]):
        for g in range(group):
            sample = {"response": f"Attempt {i}.{g}.\nWe count.\n{problem['reference']}", "verdict": verdict(i, g)}
            row = problem | {"kind": "math", "sample": g, "length": 9, "ended": True} | sample
            rows.append(row if reference else row | {"reference": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def calibration(rollouts, changes=None, judges=None) -> Calibrate:
    """configs/calibrate.py:tiny on some rollouts, whole ones alone, and changed."""
    made = config_dict("calibrate", "tiny").copy_and_resolve_references().unlock()
    made.rollouts = rollouts
    made.data.source = str(ROOT / "configs/data/arithmetic.jsonl")
    made.wave, made.group = 8, 1
    made.repeats.rollouts = made.prefixes.rollouts = 0
    made.grader.seconds = 20.0
    if judges is not None:
        made.judges = judges
    for path, value in (changes or {}).items():
        *sections, leaf = path.split(".")
        section = made
        for key in sections:
            section = section[key]
        section[leaf] = value
    return resolve(made)


def stub_judge(stub):
    """The judges of a config: one, which the stub answers for."""
    judge = config_dict("calibrate", "tiny").judges.text.copy_and_resolve_references().unlock()
    judge.backend = "openai"
    judge.endpoint.update(base_url=stub.base_url, model="stub", api_key_variable="", concurrency=4, retries=0)
    return {"stub": judge}


def results(folder):
    """What a calibration found."""
    return json.loads((folder / "results.json").read_text())


def lines(folder, **wanted):
    """The rows of its main table that have these values."""
    rows = results(folder)["calibration"]
    return [line for line in rows if all(line[name] == value for name, value in wanted.items())]


REFERENCES = [row["reference"] for row in read_jsonl(ROOT / "configs/data/arithmetic.jsonl")[:4]]
