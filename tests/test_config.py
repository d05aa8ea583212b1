"""The config's one crossing: what resolves, what is refused and with which words, and that no knob is idle."""

import ast
import collections
import dataclasses
import json
import pathlib
import typing

import pytest
from ml_collections import ConfigDict
from tiny_runs import LIVELY, ROOT, config_dict

from configs import ablations
from exprl_jax.config import TASKS, Config, Evaluate, Sft
from exprl_jax.kinds import KINDS
from exprl_jax.layout import check_layout
from exprl_jax.resolve import differences, resolve, to_dict
from exprl_jax.reward.segments import segment_rule

PAPER = (
    "distill_4b",
    "grpo_4b",
    "grpo_8b",
    "mixed_8b",
    "outcome_4b",
    "outcome_8b",
    "process_delta_4b",
    "process_delta_8b",
    "process_end_4b",
    "process_group_4b",
    "sft_4b",
    "stage2_8b",
)
# The arms of each file, the default first.
ARMS = {
    "ablations": tuple(ablations.ARMS),
    "annotate": ("4b", "smoke", "tiny"),
    "calibrate": ("4b", "smoke", "tiny"),
    "evaluate": ("4b", "8b", "smoke", "tiny"),
    "judge": ("600m", "text", "smoke", "tiny"),
    "label": ("8b", "prefix", "smoke", "tiny"),
    "mini.evaluate": ("held_out", "tune", "train"),
    "mini.judge": ("judge", "listed", "short"),
    "mini.sft": ("base", "answer_first", "forward"),
    "mini.stage1": ("outcome", "process", "end", "group", "sparse", "learned", "likelihood", "distill"),
    "one_chip": ("large", "small"),
    "smoke": ("outcome", "process", "stage2", "sums", "sums_process", "sums_sparse"),
    "stage1": ("outcome", "process"),
    "stage2": ("released", "text"),
    "tiny": ("outcome", "process", "mixed", "text", "sparse", "stage2", "distill", "sft", "lora"),
}
KNOWN = "'rl', 'distill', 'sft', 'judge', 'evaluate', 'calibrate', 'annotate', 'label'"
COMMITTED = [(name, arm) for name, arms in ARMS.items() for arm in arms]
COMMITTED += [(name, None) for name in ("mini.stage2", *(f"paper.{name}" for name in PAPER))]


def changed(changes, name="tiny", arm="outcome"):
    return resolve(config_dict(name, arm, changes))


# ------------------------------------------------------------------------------------------------ what resolves


def test_every_committed_config_is_listed_here():
    files = [path for path in (ROOT / "configs").rglob("*.py") if "def get_config(" in path.read_text()]
    names = {".".join(path.relative_to(ROOT / "configs").with_suffix("").parts) for path in files}
    assert names == {name for name, _ in COMMITTED}


@pytest.mark.parametrize("name, arm", COMMITTED)
def test_a_committed_config_resolves_and_survives_a_round_trip(name, arm):
    resolved = changed({}, name, arm)
    assert type(resolved) is TASKS[resolved.task]
    assert resolve(to_dict(resolved)) == resolved
    assert differences(to_dict(resolved), to_dict(resolved)) == []
    if resolved.task in ("rl", "distill"):
        segment_rule(resolved)
        check_layout(resolved, resolved.mesh.data if resolved.mesh.data > 0 else 1)


@pytest.mark.parametrize("name", ARMS)
def test_the_first_arm_is_the_default(name):
    assert resolve(config_dict(name)) == changed({}, name, ARMS[name][0])


@pytest.mark.parametrize("name, arm", COMMITTED)
def test_committed_configs_are_locked(name, arm):
    assert config_dict(name, arm).is_locked


@pytest.mark.parametrize("name", ARMS)
def test_an_unknown_arm_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"configs/{name.replace('.', '/')}\.py:proces: expected ") as caught:
        config_dict(name, "proces")
    assert all(arm in str(caught.value) for arm in ARMS[name])


@pytest.mark.parametrize("arm", ablations.ARMS)
def test_an_ablation_changes_what_it_says_and_nothing_else(arm):
    start, changes = ablations.ARMS[arm]
    lines = differences(to_dict(changed({}, "ablations", arm)), to_dict(resolve(start())))
    implied = {"reference.execution.kv_dtype"} if arm == "int8" else set()
    assert {line.partition(":")[0] for line in lines} == set(changes) | implied


def test_an_arm_is_a_short_difference():
    """D12: what an arm changes is visible as a diff, and is what the paper's table says."""
    lines = differences(to_dict(changed({}, "stage1", "process")), to_dict(changed({}, "stage1", "outcome")))
    assert lines == [
        "loss.clip_high: 0.26 != 0.28",
        "rollout.group: 16 != 10",
        "rollout.wave: 2 != 4",
        "routes.choice: 'process' != 'outcome'",
        "routes.math: 'process' != 'outcome'",
        "updates.per_batch: 1 != 2",
    ]


def test_a_whole_number_is_a_float_where_one_is_wanted():
    resolved = changed({"advantage.overlong_penalty": -1.0})
    as_int = to_dict(resolved)
    as_int["advantage"]["overlong_penalty"] = -1
    assert resolve(as_int) == resolved
    assert type(resolve(as_int).advantage.overlong_penalty) is float


def test_differences_name_leaves_and_absent_keys():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 2, "d": 4}}) == [
        "a: 1 != '(absent)'",
        "b.d: 3 != 4",
    ]


# ------------------------------------------------------------------------------------------------ what is refused


def refused(values):
    with pytest.raises(ValueError) as caught:
        resolve(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain():
    return to_dict(changed({}))


def test_a_misspelt_key_is_answered_with_the_nearest():
    values = plain()
    values["rollout"]["temprature"] = 1.0
    assert refused(values) == "unknown config key config.rollout.temprature; did you mean config.rollout.temperature?"


def test_an_unknown_key_without_a_neighbour_is_answered_with_the_keys():
    values = plain()
    values["probe"]["qqqq"] = 1
    assert refused(values) == "unknown config key config.probe.qqqq; its keys are strict"


def test_a_missing_key_is_named():
    values = plain()
    del values["loss"]["kl_coef"]
    assert refused(values) == "config key config.loss.kl_coef is missing; add it to the config file"
    assert refused({}) == "config key config.task is missing; add it to the config file"
    assert refused({"task": "rl"}) == "config key config.seed is missing; add it to the config file"


def test_a_section_must_be_one():
    assert "config.mesh: expected a section with keys data, model, got 8" in refused(plain() | {"mesh": 8})


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("seed", 1.0, "config.seed: got 1.0 of type float, expected int"),
        ("seed", True, "config.seed: got True of type bool, expected int"),
        ("probe.strict", 1, "config.probe.strict: got 1 of type int, expected bool"),
        ("data.source", 3, "config.data.source: got 3 of type int, expected str"),
        ("loss.kl_coef", "0", "config.loss.kl_coef: got '0' of type str, expected float"),
        ("loss.kl_coef", True, "config.loss.kl_coef: got True of type bool, expected float"),
        ("advantage.estimator", "grpo", "got 'grpo', expected one of 'delta_norm', 'end_norm', 'group_norm'"),
        ("advantage.overlong", "drop", "got 'drop', expected one of 'zero_score', 'mask', 'penalty', 'keep'"),
        ("judge.unit", "outcome", "config.judge.unit: got 'outcome', expected one of 'prefix', 'step'"),
        ("judge.backend", "vllm", "config.judge.backend: got 'vllm', expected one of 'local', 'openai'"),
        (
            "routes.choice",
            "grader",
            "config.routes.choice: got 'grader', expected one of 'process', 'outcome', 'verifier'",
        ),
        ("distillation.kl", "forward", "config.distillation.kl: got 'forward', expected one of 'sampled', 'full'"),
        ("task", "train", f"config.task: got 'train', expected one of {KNOWN}"),
        ("task", "sft", "unknown config key config."),
        ("rollout.max_resample", 1.0, "config.rollout.max_resample: got 1.0 of type float, expected int"),
        ("policy.execution.compute_dtype", "fp8", "config.policy.execution.compute_dtype: got 'fp8', expected one of"),
    ],
)
def test_a_value_of_another_type_is_refused(path, value, message):
    values = plain()
    section = values
    *sections, leaf = path.split(".")
    for key in sections:
        section = section[key]
    section[leaf] = value
    assert message in refused(values)


POSITIVE = [
    "steps",
    "data.max_prompt_tokens",
    "mesh.model",
    "rollout.prompts",
    "rollout.group",
    "rollout.wave",
    "rollout.max_tokens",
    "segments.max_segments",
    "judge.max_tokens",
    "judge.max_context_tokens",
    "judge.max_trace_tokens",
    "updates.per_batch",
    "updates.logp_chunk",
    "checkpoint.every",
    "checkpoint.keep",
    "grader.workers",
    "grader.seconds",
    "optimizer.clip_norm",
    "optimizer.eps",
    "judge.endpoint.concurrency",
    "judge.endpoint.seconds",
    "judge.workers.count",
    "judge.workers.batch",
    "judge.workers.seconds",
    "code.seconds",
    "code.memory_mb",
]
NOT_NEGATIVE = [
    "seed",
    "advantage.min_spread",
    "loss.kl_coef",
    "loss.clip_low",
    "loss.clip_high",
    "log.rollouts",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "loss.entropy_coef",
    "rollout.max_resample",
    "updates.row_tokens",
    "updates.microbatch",
    "rollout.slots",
    "judge.wave",
    "rollout.expected_tokens",
    "judge.endpoint.retries",
]


def typed(path, number):
    """The number as the leaf's own type."""
    value = plain()
    for key in path.split("."):
        value = value[key]
    return type(value)(number)


@pytest.mark.parametrize("path", POSITIVE)
def test_what_must_be_positive_is(path):
    for number in (0, -1):
        with pytest.raises(
            ValueError, match=rf"^config\.{path}: got {typed(path, number)}, expected a positive number"
        ):
            changed({path: typed(path, number)})


@pytest.mark.parametrize("path", NOT_NEGATIVE)
def test_what_must_not_be_negative_is_not(path):
    with pytest.raises(ValueError, match=rf"^config\.{path}: got {typed(path, -1)}, expected zero or more"):
        changed({path: typed(path, -1)})
    changed({path: typed(path, 0)})


PROCESS = dict.fromkeys(KINDS, "process")
OPENAI = {
    "judge.backend": "openai",
    "judge.readout": "text",
    "judge.endpoint.base_url": "http://127.0.0.1:8000/v1",
    "judge.endpoint.model": "judge",
}
DISTILL = {"task": "distill", "loss.kl_coef": 0.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"optimizer.b1": 1.0}, r"optimizer.b1: got 1.0, expected a number in \[0, 1\)"),
        ({"optimizer.b2": -0.1}, r"optimizer.b2: got -0.1, expected a number in \[0, 1\)"),
        ({"optimizer.warmup": 1.0}, r"optimizer.warmup: got 1.0, expected a number in \[0, 1\)"),
        ({"optimizer.warmup": -0.1}, r"optimizer.warmup: got -0.1, expected a number in \[0, 1\)"),
        ({"judge.endpoint.max_missing": 1.0}, r"judge.endpoint.max_missing: got 1.0, expected a number in \[0, 1\)"),
        ({"loss.clip_low": 1.5}, "loss.clip_low: got 1.5, expected at most 1"),
        ({"loss.dual_clip": 1.0}, "loss.dual_clip: got 1.0, expected more than 1, or 0 for none"),
        ({"rollout.temperature": 0.0}, "rollout.temperature: got 0.0, expected a positive number"),
        ({"rollout.temperature": -1.0}, "rollout.temperature: got -1.0, expected zero or more"),
        ({"steps": 1 << 20}, "steps: got 1048576, expected less than 1048576"),
        ({"rollout.max_resample": 1 << 10}, "rollout.max_resample: got 1024, expected less than 1024"),
        (
            {"optimizer.learning_rate": 1e308},
            r"optimizer.learning_rate: got 1e\+308, expected a finite number, zero or",
        ),
        ({"optimizer.eps": 1e-320}, "optimizer.eps: got 1e-320, expected a finite number, zero or in size"),
        ({"policy.date": "2026-02-30"}, "policy.date: got '2026-02-30', expected a day that is in the calendar, as"),
        ({"judge.model.date": "today"}, "judge.model.date: got 'today', expected a day that is in the calendar"),
        ({"reference.date": "20260101"}, "reference.date: got '20260101', expected a day that is in the calendar"),
        ({"code.seconds": 1e9}, "code.seconds: got 1000000000.0, expected a positive number of seconds"),
        ({"mesh.data": 0}, "mesh.data: got 0, expected a positive number, or -1 for all devices"),
        ({"policy.weights": ""}, "policy.weights: got '', expected a model"),
        ({"reference.weights": ""}, "reference.weights: got '', expected a model"),
        ({"judge.model.weights": ""}, "judge.model.weights: got '', expected a model"),
        ({"rollout.wave": 3}, "rollout.wave: got 3, expected a divisor of rollout.prompts = 8"),
        ({"judge.wave": 3}, "judge.wave: got 3, expected a divisor of rollout.wave = 8, or 0 for as many"),
        ({"rollout.expected_tokens": 9}, "rollout.expected_tokens: got 9, expected 0 with rollout.slots = 0"),
        (
            {"rollout.expected_tokens": 25, "rollout.slots": 2},
            "rollout.expected_tokens: got 25, expected at most rollout.max_tokens = 24",
        ),
        ({"updates.per_batch": 3}, "updates.per_batch: got 3, expected a divisor of rollout.prompts = 8"),
        (
            {"updates.row_tokens": 535},
            r"updates.row_tokens: got 535, expected at least 536, data.max_prompt_tokens \+ rollout.max_tokens: a "
            "rollout",
        ),
        (
            {"rollout.max_tokens": 129},
            r"updates.row_tokens: got 640, expected at least 641, data.max_prompt_tokens \+ rollout.max_tokens: a "
            "rollout",
        ),
        (DISTILL | {"updates.row_tokens": 100}, "updates.row_tokens: got 100, expected at least 536"),
        (
            {"rollout.group": 1},
            "rollout.group: got 1, expected at least 2: the routes outcome and verifier compare within a group",
        ),
        ({"rollout.group": 1, "routes": PROCESS | {"code": "verifier"}}, "rollout.group: got 1, expected at least 2"),
        *(
            ({"judge.endpoint.extra_body": text}, "judge.endpoint.extra_body: got .*, expected a JSON object without")
            for text in (
                "",
                "[]",
                "null",
                "3",
                "{",
                '{"top_p": NaN}',
                '{"a": 1, "a": 2}',
                '{"top_p": 1e999}',
                '{"n": 2}',
                "[" * 100_000,
            )
        ),
        ({"judge.endpoint.budget_key": "tokens"}, "judge.endpoint.budget_key: got 'tokens', expected one of"),
        (
            OPENAI | {"judge.endpoint.base_url": ""},
            "judge.endpoint.base_url: got '', expected an http:// or https:// URL",
        ),
        (
            OPENAI | {"judge.endpoint.base_url": "ftp://x/v1"},
            "judge.endpoint.base_url: got 'ftp://x/v1', expected an http",
        ),
        (OPENAI | {"judge.endpoint.model": ""}, "judge.endpoint.model: got '', expected the model's name there"),
        *(
            (
                {"judge.backend": "function", "judge.function": name},
                f"judge.function: got {name!r}, expected 'package.module:name' or 'path/to/file.py:name'",
            )
            for name in ("", "rewards.py", "rewards:", ":score", "my rewards:score", "rewards.py:1st")
        ),
        ({"grader.function": "mine"}, "grader.function: got 'mine', expected 'package.module:name' or"),
        (
            {"judge.backend": "function", "judge.function": "a:b", "judge.rubric": "mine.txt"},
            "judge.rubric: got 'mine.txt', expected '' with backend = 'function'",
        ),
        ({"judge.workers.seconds": 1e5}, "judge.workers.seconds: got 100000.0, expected a positive number of seconds"),
        ({"judge.workers.max_missing": 1.0}, r"judge.workers.max_missing: got 1.0, expected a number in \[0, 1\)"),
        (DISTILL | {"updates.per_batch": 2}, "updates.per_batch: got 2, expected 1 with task = 'distill': on-policy"),
        (DISTILL | {"rollout.max_resample": 1}, "rollout.max_resample: got 1, expected 0 with task = 'distill'"),
        (
            DISTILL | {"loss.kl_coef": 0.1},
            "loss.kl_coef: got 0.1, expected 0 with task = 'distill', whose loss is the KL",
        ),
        (DISTILL | {"loss.entropy_coef": 0.1}, "loss.entropy_coef: got 0.1, expected 0 with task = 'distill'"),
        (
            {"advantage.overlong": "penalty", "advantage.overlong_penalty": 0.0},
            "advantage.overlong_penalty: got 0.0, expected negative",
        ),
    ],
)
def test_values_that_contradict_one_another_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^config\.{message}"):
        changed(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"updates.row_tokens": 536, "updates.microbatch": 5},  # an update may have rows that stay empty
        {"rollout.group": 1, "routes": PROCESS},  # no route compares within a group
        OPENAI,
        OPENAI | {"judge.readout": "logits", "judge.endpoint.extra_body": '{"temperature": null}'},
        {"judge.endpoint.base_url": "", "judge.endpoint.model": ""},  # of a local judge
        {"judge.backend": "function", "judge.function": "~/my rewards.py:score"},
        {"judge.backend": "function", "judge.function": "rewards.of_mine:score"},
        DISTILL,
        {"loss.clip_low": 1.0, "loss.dual_clip": 0.0},  # no lower clip, no dual clip
        {"judge.endpoint.max_missing": 0.0, "optimizer.warmup": 0.0, "steps": (1 << 20) - 1},
    ],
)
def test_values_at_the_edge_of_what_goes_together_resolve(changes):
    assert resolve(to_dict(changed(changes))) == changed(changes)


@pytest.mark.parametrize(
    "rule, message",
    [
        ("stride:", r"config.segments.rule: got 'stride:', expected stride:<tokens>"),
        ("stride:-4", r"got 'stride:-4', expected stride:<tokens>"),
        ("line:3", r"got 'line:3'; only stride: and regex: take an argument"),
        ("chapter", r"got .chapter.|chapter"),
        ("regex:(", r"segment pattern .* is not a regular expression: missing"),
        ("stride:0", r"stride"),
    ],
)
def test_a_segment_rule_that_is_none_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        segment_rule(changed({"segments.rule": rule}))


# ------------------------------------------------------------------------------------------------ other tasks


def sft(**changes):
    """Supervised training with the sections of configs/tiny.py."""
    rl = plain()
    shared = {name: rl[name] for name in ("seed", "data", "mesh", "policy", "lora", "optimizer", "checkpoint")}
    own = dict(task="sft", epochs=2, steps=0, batch=8, microbatch=4, row_tokens=256, logp_chunk=256)
    own |= dict(log=dict(to=""), validation=dict(every=0, fraction=0.0, source=""))
    return shared | own | changes


def evaluate(**changes):
    """An evaluation with the sections of configs/tiny.py."""
    rl = plain()
    shared = {name: rl[name] for name in ("seed", "data", "mesh", "policy", "judge", "grader", "code")}
    shared["data"] = {name: value for name, value in rl["data"].items() if "held_out" not in name}
    sampling = dict(samples=8, group=4, wave=8, slots=0, max_tokens=24, temperature=0.8) | changes.pop("sampling", {})
    return shared | dict(task="evaluate", label="tiny", sampling=sampling) | changes


def test_the_task_names_the_record():
    for task, values, record in (("sft", sft(), Sft), ("evaluate", evaluate(), Evaluate), ("rl", plain(), Config)):
        resolved = resolve(values)
        assert type(resolved) is record is TASKS[task] and resolved.task == task
        assert to_dict(resolved) == values and resolve(to_dict(resolved)) == resolved
        assert resolve(ConfigDict(values)) == resolved
    assert resolve(plain() | {"task": "distill", "loss": plain()["loss"] | {"kl_coef": 0.0}}).task == "distill"


@pytest.mark.parametrize(
    "values, message",
    [
        (lambda: {"task": "sftt"}, f"config.task: got 'sftt', expected one of {KNOWN}"),
        (lambda: {"task": None}, f"config.task: got None, expected one of {KNOWN}"),
        (lambda: {"seed": 1}, "config key config.task is missing; add it to the config file"),
        (lambda: sft(rollout={}), "unknown config key config.rollout; its keys are task, seed, epochs, steps, mesh"),
        (lambda: evaluate(label=3), "config.label: got 3 of type int, expected str"),
        (lambda: sft(epochs=0), "config.epochs: got 0, expected a positive number"),
        (lambda: sft(batch=-1), "config.batch: got -1, expected a positive number"),
        (lambda: sft(row_tokens=-1), "config.row_tokens: got -1, expected zero or more"),
        (lambda: evaluate(sampling=dict(samples=0)), "config.sampling.samples: got 0, expected a positive number"),
        (
            lambda: evaluate(sampling=dict(temperature=-0.1)),
            "config.sampling.temperature: got -0.1, expected zero or more",
        ),
        (
            lambda: evaluate(sampling=dict(group=3)),
            "config.sampling.group: got 3, expected a divisor of config.sampling.samples = 8",
        ),
    ],
)
def test_what_other_tasks_cannot_have_is_refused(values, message):
    assert refused(values()).startswith(message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"every": 0}, "config.validation.every: got 0, expected a positive number where examples are held back, and"),
        ({"fraction": 0.0}, "config.validation.every: got 4, expected a positive number where examples are held back"),
        ({"source": "a.jsonl"}, "config.validation.source: got 'a.jsonl', expected '' beside config.validation.frac"),
        ({"fraction": 1.0}, "config.validation.fraction: got 1.0, expected a number in [0, 1)"),
        ({"wave": 0}, "config.validation.wave: got 0, expected a positive number"),
    ],
)
def test_a_validation_holds_something_back_when_it_is_made(changes, message):
    values = to_dict(changed({}, "judge", "tiny"))
    assert refused(values | {"validation": values["validation"] | changes}).startswith(message)


def test_a_judge_that_is_trained_is_local():
    values = to_dict(changed({}, "judge", "tiny"))
    assert type(resolve(values)) is TASKS["judge"] and resolve(values).policy == resolve(values).judge.model
    elsewhere = {"base_url": "http://localhost:1/v1", "model": "m"}
    values["judge"] |= {"backend": "openai", "endpoint": values["judge"]["endpoint"] | elsewhere}
    assert refused(values) == (
        "config.judge.backend: got 'openai', expected 'local': the judge's model is trained here"
    )


def test_greedy_samples_are_an_evaluations_alone():
    assert resolve(evaluate(sampling=dict(temperature=0.0))).sampling.temperature == 0
    assert "config.rollout.temperature: got 0.0, expected a positive number" in refused(
        plain() | {"rollout": plain()["rollout"] | {"temperature": 0.0}}
    )


# ------------------------------------------------------------------------------------------------ segments, waves


def test_segment_rules_take_their_arguments_and_an_outcome_judge_one_segment():
    rule = segment_rule(changed({"segments.rule": "stride:7"}, arm="process"))
    assert (rule.stride, rule.max_segments) == (7, 3)
    assert segment_rule(changed({"segments.rule": "regex:^a:b"}, arm="process")).pattern == "^a:b"
    assert segment_rule(changed({"segments.max_segments": 9})).max_segments == 1
    assert segment_rule(changed({"segments.max_segments": 9, "routes.code": "process"})).max_segments == 9


def test_every_device_gets_a_part_of_every_wave_and_microbatch():
    wave = r"^config.rollout.wave: got 8, expected a multiple of mesh.data = 16, so that every device has a problem of"
    with pytest.raises(ValueError, match=wave):
        check_layout(changed({}), 16)
    rows = r"^config.updates.microbatch: got 4, expected a multiple of mesh.data = 8, so that every device has a row of"
    with pytest.raises(ValueError, match=rows) as caught:
        check_layout(changed({"updates.microbatch": 4}), 8)
    assert "\n" not in str(caught.value)
    check_layout(changed({"updates.per_batch": 2}), 8)  # rows are packed from all of an update's rollouts
    check_layout(changed({"updates.microbatch": 12, "rollout.wave": 4}), 4)


# ------------------------------------------------------------------------------------------------ no idle knob


def leaves(cls, path=()):
    """(record that it is of, path) of every leaf of a record."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, (*path, name))
        else:
            yield cls.__name__, (*path, name)


RECORDS = list(dict.fromkeys(TASKS.values()))
LEAVES = sorted({leaf for record in RECORDS for leaf in leaves(record)})


def trees(folder, skipped=()):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if path.parent.name not in skipped and path.name not in skipped:
            yield ast.parse(path.read_text())


def last_name(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def elements(node):
    return node.elts if isinstance(node, ast.Tuple) else [node]


READS = {  # but schema and checks, which use no leaf
    (last_name(node.value), node.attr)
    for tree in trees(ROOT / "exprl_jax", skipped=("config", "resolve.py"))
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
}
# What holds a record: arguments and fields that are annotated with it, what an object keeps of such an argument, and
# variables that a section of a config is assigned to (by the section's name).
HOLDERS = collections.defaultdict(set)
for tree in trees(ROOT / "exprl_jax"):
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            HOLDERS[last_name(node.annotation)] |= {name, f"_{name}"}
        elif isinstance(node, ast.Assign):
            for target, value in zip(elements(node.targets[0]), elements(node.value)):
                if isinstance(value, ast.Attribute):
                    HOLDERS[value.attr].add(last_name(target))
# The properties and methods of a record that read each of its leaves; all of them where the name is computed.
DERIVED = collections.defaultdict(set)
for record in (node for tree in trees(ROOT / "exprl_jax/config") for node in tree.body):
    for method in record.body if isinstance(record, ast.ClassDef) else ():
        for node in ast.walk(method) if isinstance(method, ast.FunctionDef) else ():
            if isinstance(node, ast.Attribute) and last_name(node.value) == "self":
                DERIVED[record.name, node.attr].add(method.name)
            elif isinstance(node, ast.Call) and [last_name(x) for x in node.args[:1]] == ["self"]:
                DERIVED[record.name, "*"].add(method.name)
DERIVED["Routes", "*"] = DERIVED["_RouteByKind", "*"]  # the record made of it has a key for each kind of problem
DERIVED["Log", "to"] = DERIVED["Tracking", "to"]  # its heir


@pytest.mark.parametrize("record, path", LEAVES, ids=[".".join((record, *path)) for record, path in LEAVES])
def test_every_leaf_is_read(record, path):
    *sections, leaf = path
    # What holds a whole config is called so.
    owners = HOLDERS[record] | ({sections[-1]} | HOLDERS[sections[-1]] if sections else {"config"})
    names = {leaf} | DERIVED[record, leaf] | DERIVED[record, "*"]
    assert any((owner, name) in READS for owner in owners for name in names), f"{'.'.join(path)} is read nowhere"


def values_in_tests():
    """Constants that tests give to a leaf: `leaf=constant`, or a dict's `"section.leaf": constant`."""
    values_of = collections.defaultdict(set)

    def add(name, node):
        try:
            values_of[name].add(json.dumps(ast.literal_eval(node)))
        except (ValueError, TypeError):
            pass  # not a constant, or one that no leaf can have

    for tree in trees(ROOT / "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    add(keyword.arg, keyword.value)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        add(key.value, value)
    return values_of


def knobs(section, path=""):
    """(section's type, name, dotted path, value) of every leaf of a resolved config."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{path}{field.name}"
        for each in value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(each):
                yield from knobs(each, f"{name}.")
            else:
                yield type(section).__name__, field.name, name, each


def test_every_leaf_is_set_differently_somewhere():
    """A knob exists only if two committed configs, or a config and a test, set it differently; a section's knobs are
    the same ones wherever it stands."""
    values_of, in_tests = collections.defaultdict(set), values_in_tests()
    for name, arm in COMMITTED:
        for section, leaf, path, value in knobs(changed({}, name, arm)):
            values_of[section, leaf] |= {json.dumps(value)} | in_tests[path] | in_tests[leaf]
    assert [knob for knob, values in sorted(values_of.items()) if len(values) < 2] == []


def test_the_tests_own_changes_are_leaves():
    assert {tuple(path.split(".")) for path in LIVELY} <= {path for _, path in leaves(Config)}
    assert isinstance(config_dict("tiny"), ConfigDict)
