"""The door: `python -m exprl_jax.main --config=configs/stage1.py --workdir=...`.

Whatever cannot work ends with one line on stderr and exit status 1 (2 for a wrong command line); the traceback of a
fault in this program itself is printed.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from absl import flags

from exprl_jax.packaged import define_config

_CONFIG = define_config("config", "The experiment: a file in configs/, optionally with :arm.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; starting again in it resumes.")
_DIFF = define_config("diff", "Another config: print what differs between the two, and exit.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what the config resolves to and what it needs, and exit.")
_SHOW = flags.DEFINE_integer(
    "show",
    None,
    "Show what a run would make of its first so many problems, and exit; trains and writes nothing.",
    lower_bound=1,
)
_SHOW_JSON = flags.DEFINE_bool("show_json", False, "With --show: JSON, a line a problem, instead of a page.")
_ACCEPT_LOST = flags.DEFINE_bool(
    "accept_lost_records", False, "Go on in a workdir whose checkpoints or metrics somebody has deleted."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "none", ["none", "auto"], "auto: one process of the Cloud TPU slice, Slurm step or MPI job."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where there is no such launcher.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "This process's index, from 0.", lower_bound=0)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds",
    100,
    "Seconds of silence after which a process counts as dead and the others end; 100 by default.",
    lower_bound=1,
)
_OPTIONS = (
    _CONFIG,
    _WORKDIR,
    _DIFF,
    _DRY_RUN,
    _SHOW,
    _SHOW_JSON,
    _ACCEPT_LOST,
    _DISTRIBUTED,
    _COORDINATOR,
    _PROCESSES,
    _PROCESS,
    _HEARTBEAT,
)


def main(argv: list[str]) -> int:
    """Parses the command line, runs the experiment and returns the exit status."""
    try:
        if (topic := _help_topic(argv)) is not None:
            from exprl_jax.help import describe

            print(describe(topic, {option.name: flags.FLAGS[option.name].help for option in _OPTIONS}))
            return 0
        rest = flags.FLAGS(argv)[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; every option is --name=value")
        if _CONFIG.value is None:
            raise ValueError("--config is missing; for instance --config=configs/smoke.py")
        _check_options()
        settings = _CONFIG.value.to_dict()
        others = {} if _DIFF.value is None else _DIFF.value.to_dict()
    except Exception as error:  # a config file is a program, and may raise anything
        return _complain(_reason(error), 2)

    # Only now the slow imports, so that a typing error is answered at once.
    import jax

    from exprl_jax.resolve import differences, resolve, to_dict
    from exprl_jax.weights.sources import default_cache_dir

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        config = resolve(settings)
        if others:
            print("\n".join(differences(to_dict(config), to_dict(resolve(others)))) or "no difference")
            return 0
        if _DRY_RUN.value:
            from exprl_jax.plan.dry_run import describe

            print(describe(config))
            return 0
        if _SHOW.value is not None:
            from exprl_jax.show.show import show

            show(config, _SHOW.value, _SHOW_JSON.value)
            return 0
        from exprl_jax.run import distributed

        if _COORDINATOR.value is not None:
            distributed.connect(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
        elif _DISTRIBUTED.value == "auto":
            distributed.connect_detected(_HEARTBEAT.value)
        with distributed.ending_together():
            _run(config, _WORKDIR.value, _ACCEPT_LOST.value)
    except (ValueError, FloatingPointError, OSError) as error:
        return _complain(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _complain(
            f"out of device memory: {str(error).splitlines()[0]}; lower the config's wave or microbatch", 1
        )
    except MemoryError as error:
        return _complain(
            f"out of host memory: {error}; lower the config's rollout.group, updates.row_tokens or microbatch", 1
        )
    except KeyboardInterrupt:
        return _complain("interrupted; the last checkpoint stands", 130)
    return 0


def _check_options() -> None:
    """Refuses options that do not go together."""
    if _SHOW_JSON.value and _SHOW.value is None:
        raise ValueError("--show_json says how --show writes; give --show=1 too")
    if _WORKDIR.value is None and not _DRY_RUN.value and _DIFF.value is None and _SHOW.value is None:
        raise ValueError("--workdir is missing; for instance --workdir=runs/smoke")
    if len({_COORDINATOR.value is None, _PROCESSES.value is None, _PROCESS.value is None}) > 1:
        raise ValueError("--coordinator, --processes and --process go together; give all three or none")
    if _DISTRIBUTED.value == "auto" and _COORDINATOR.value is not None:
        raise ValueError(
            "--distributed=auto finds out what --coordinator, --processes and --process say; give it alone"
        )
    if _SHOW.value is not None:
        others = {_DIFF.name: _DIFF.value, _DRY_RUN.name: _DRY_RUN.value, _COORDINATOR.name: _COORDINATOR.value}
        others[_DISTRIBUTED.name] = _DISTRIBUTED.value == "auto"
        for name in [name for name, given in others.items() if given]:
            raise ValueError(f"--show and --{name} do not go together; give one of them")


def _help_topic(argv: list[str]) -> str | None:
    """What help is asked for: a section, a key, a task, or everything (an empty topic); None where it is not."""
    for argument in argv[1:]:
        name, _, topic = argument.partition("=")
        if name in ("--help", "-help", "-h"):
            return topic
    return None


def _run(config: Any, workdir: str, accept_lost_records: bool) -> None:
    """Hands over to the task that the config names."""
    from exprl_jax.run.workdir import begun_config, recorded_config
    from exprl_jax.sizes import recorded_sizes
    from exprl_jax.weights.language_model import pin_checkpoints

    config = recorded_sizes(pin_checkpoints(config, recorded_config(workdir)), begun_config(workdir))
    if config.task == "rl":
        from exprl_jax.train import train

        train(config, workdir, accept_lost_records)
    elif config.task == "distill":
        from exprl_jax.distill import distill

        distill(config, workdir, accept_lost_records)
    elif config.task == "sft":
        from exprl_jax.sft import sft

        sft(config, workdir, accept_lost_records)
    elif config.task == "judge":
        from exprl_jax.judge_training import train_judge

        train_judge(config, workdir, accept_lost_records)
    elif config.task == "evaluate":
        from exprl_jax.evaluation.evaluate import evaluate

        evaluate(config, workdir)
    elif config.task == "calibrate":
        from exprl_jax.evaluation.calibrate import calibrate

        calibrate(config, workdir)
    elif config.task == "annotate":
        from exprl_jax.evaluation.annotate import annotate

        annotate(config, workdir)
    else:
        from exprl_jax.evaluation.label import label

        label(config, workdir)


def _reason(error: BaseException) -> str:
    """The part that matters of what absl, config_flags or a config file raised."""
    if (line := _config_line(error)) is not None:
        return f"--config: {line}: {type(error).__name__}: {error}"
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return f"--config: {error}"
    if isinstance(error, KeyError | AttributeError):
        key = error.args[0]  # of an AttributeError, the KeyError that caused it
        return f"unknown config key {key.args[0] if isinstance(key, KeyError) else key}"
    lines = str(error).strip().splitlines()
    if "Traceback (most recent call last):" in lines:  # config_flags puts one around what a config file raises
        return lines[-1].partition(": ")[2]
    if isinstance(error, OSError):  # config_flags lists its attempts; the last line says why the last one failed
        return f"--config: {lines[-1].strip()}"
    return f"{error}" or type(error).__name__


def _config_line(error: BaseException) -> str | None:
    """The line of the config file that an error comes from; None where it does not come from one.

    What a config raises on purpose (a ValueError for an arm that it does not have) needs no line.
    """
    if isinstance(error, ValueError | OSError):
        return None
    files = {os.path.abspath(name) for name in _config_files()}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if os.path.abspath(frame.filename) in files]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else None


def _config_files() -> list[str]:
    options = [argument.partition("=") for argument in sys.argv[1:]]
    return [value.partition(":")[0] for name, _, value in options if name.lstrip("-") in ("config", "diff")]


def _complain(error: object, status: int) -> int:
    text = " ".join(str(error).split())
    print(f"exprl_jax: {text}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv))
