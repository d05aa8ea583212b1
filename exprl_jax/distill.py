"""On-policy self-distillation: the frozen start of the policy, shown the reference solution, is its teacher.

    problems → prompts → sampler → teacher's log-probs → update → checkpoint, metrics

The policy samples from the bare problem, as everywhere.  The teacher scores the same tokens after a prompt that holds
problem and reference, and the policy is moved towards it by the reverse KL(policy ‖ teacher) of each token: from the
sampled tokens alone, with the advantage log π_teacher − log π of an on-policy update (the released baseline), or over
the full vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from exprl_jax import programs as programs_room
from exprl_jax.config import Config, to_dict
from exprl_jax.data.packing import Example, fill_rows
from exprl_jax.data.problems import batch_indices
from exprl_jax.data.prompts import teacher_prompt
from exprl_jax.loop import Taken, follow
from exprl_jax.mesh import Placement, gather_rows, put_microbatches
from exprl_jax.metrics import Clock
from exprl_jax.records import Teaching, TrainState
from exprl_jax.reward.statistics import VERDICTS, rollout_statistics
from exprl_jax.reward.verifiers.grading import Graders
from exprl_jax.rollout.waves import Prompts, make_prompts
from exprl_jax.train import (
    Batch,
    Ready,
    Run,
    Wave,
    join_batch,
    learned,
    local_places,
    open_graders,
    over_updates,
    packed_shape,
    padding_of,
    prepare,
    ready_update,
    sample_row,
    sample_wave,
    task_of,
)
from exprl_jax.workdir import check_workdir


@dataclasses.dataclass(frozen=True)
class Tuition:
    """A run and its teacher.

    Attributes:
      prompts: the teacher's.
    """

    run: Run
    programs: programs_room.TeacherPrograms
    prompts: Prompts


def distill(config: Config, workdir_path: str) -> None:
    """Runs the experiment in its folder, from where it stands to its last step.

    Raises:
      ValueError: anything about config, data, model or folder that cannot work, in one line.
      FloatingPointError: a metric is not finite (names step and metric).
    """
    check_workdir(workdir_path, to_dict(config))
    with contextlib.ExitStack() as held:
        tuition = prepare_tuition(config, held)
        graders = held.enter_context(open_graders(config.grader, config.code, tuition.run.kinds))
        follow(task_of(tuition.run, functools.partial(take_step, tuition, graders)), workdir_path)


def prepare_tuition(config: Config, held: contextlib.ExitStack) -> Tuition:
    """Opens what the run needs, and the teacher's prompts.

    Raises:
      ValueError: a teacher's prompt leaves no room for a response within the model's context.
    """
    run = prepare(config, held)
    prompts = {problem.id: teacher_prompt(run.policy.tokenizer, problem) for problem in run.problems}
    longest = max(prompts, key=lambda name: len(prompts[name]))
    room = min(run.policy.arch.max_positions, config.updates.row_tokens) - config.rollout.max_tokens
    if len(prompts[longest]) > room:
        raise ValueError(
            f"problem {longest!r}: its reference makes the teacher's prompt {len(prompts[longest])} tokens long, "
            f"expected at most {room}, the smaller of the model's context and updates.row_tokens less "
            "rollout.max_tokens; raise "
            "updates.row_tokens, leave the problem out or shorten the reference"
        )
    return Tuition(run, programs_room.build_teacher(config, run.mesh, run.policy), make_prompts(prompts))


def take_step(
    tuition: Tuition, graders: Graders, state: TrainState, step: int, clock: Clock, wait: Callable[[], None]
) -> Taken:
    """One step: all waves of a batch, the teacher's look at them, the update."""
    run, config = tuition.run, tuition.run.config
    indices, epoch = batch_indices(len(run.problems), config.rollout.prompts, config.seed, step)
    places = local_places(run, config.rollout.prompts)
    waves, gradings = [], []
    for place in places:
        problems = [run.problems[i] for i in indices[place]]
        with clock.phase("sample"):
            waves.append(sample_wave(run, run.model(state), problems, step, 0, np.ones(len(problems), bool)))
        gradings.append(
            graders.submit([(p, text) for p, group in zip(problems, waves[-1].responses) for text in group])
        )

    with clock.phase("pack"):
        parts = [(w.rollouts, w.rollouts.mask_PGR, np.zeros_like(w.rollouts.logp_PGR)) for w in waves]
        batch = join_batch(run, [run.problems[i] for i in indices], parts, places)
        shown = [tuition.prompts.ids[run.problems[i].id] for i in indices]
        ready = ready_update(run, batch, slice(None), [max(map(len, pair)) for pair in zip(batch.prompts, shown)])
        teaching = put_microbatches(run.mesh, teach(run, batch, ready, shown))
    experience, teacher = ready.experience, run.frozen[config.reference]
    wait()
    with clock.phase("train"):
        if config.distillation.kl == "full":
            state, update = tuition.programs.distill_step(state, run.base, teacher, teaching, experience)
            row = over_updates([jax.device_get(update)])
        else:
            signal, kl = tuition.programs.signal(run.model(state), teacher, teaching, experience)
            state, update = run.programs.train_step(state, run.base, experience.replace(advantage_MBT=signal))
            row = learned(config, [jax.device_get(update)]) | {"distill/kl": float(kl)}

    with clock.phase("grade"):
        flat = [verdict for grading in gradings for verdict in grading.result()]
    rollouts = jax.tree.map(lambda *x: np.concatenate(x), *(wave.rollouts for wave in waves))
    verdict_PG = np.array([VERDICTS.index(verdict) for verdict in flat]).reshape(rollouts.ended_PG.shape)
    table = {"length_PG": rollouts.mask_PGR.sum(-1), "ended_PG": rollouts.ended_PG, "verdict_PG": verdict_PG}
    rows = gather_rows(table, np.concatenate(places))
    tokens = int(rows["length_PG"].sum())
    row |= rollout_statistics(rows) | padding_of([ready]) | graders.throughput.report() | {"data/epoch": epoch}
    return Taken(state, row, {"sample": tokens, "train": tokens}, row["solve/accuracy"], _samples(run, waves, flat))


def teach(run: Run, batch: Batch, ready: Ready, shown: Sequence[Sequence[int]]) -> Teaching:
    """The same responses after the prompts that the teacher is shown, in the same rows."""
    filled, share = ready.packing, Placement(run.mesh).shares_segments
    responses = [
        batch.rollouts.tokens_PGR[p, g][batch.rollouts.mask_PGR[p, g]] for p, g in zip(ready.group_N, ready.index_N)
    ]
    examples = [Example(shown[p], response) for p, response in zip(ready.group_N, responses)]
    teachers = fill_rows(examples, ready.group_N, filled.row_N, packed_shape(run.config), share)
    slots = [first + np.arange(len(response)) for first, response in zip(teachers.first_N, responses)]
    return Teaching(teachers.packed, filled.spread(slots, np.int32))


def _samples(run: Run, waves: list[Wave], verdicts: list) -> list[dict]:
    """Some of the step's rows, as people read them; there are no segments and no scores."""
    G, samples = run.config.rollout.group, []
    numbered = [(wave, i) for wave in waves for i in range(len(wave.problems))]
    for g in range(G):
        for place, (wave, i) in enumerate(numbered):
            if len(samples) == run.config.log.rollouts:
                return samples
            whole = {"text": wave.responses[i][g], "score": None, "advantage": None, "judge": None}
            samples.append(sample_row(run, wave, i, g, verdicts[place * G + g]) | {"segments": [whole]})
    return samples
