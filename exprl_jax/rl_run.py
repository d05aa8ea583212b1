"""What a run on the policy's own rollouts opens before its first step: models, data, judge, verifiers and programs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from exprl_jax import programs as programs_room
from exprl_jax.config import Config, Model
from exprl_jax.data.problems import Problem
from exprl_jax.data.training import (
    check_budget,
    kinds_of,
    policy_prompts,
    prompt_style,
    read_held_out,
    read_training_problems,
    within_budget,
)
from exprl_jax.hosts import owned_problems, say
from exprl_jax.kinds import KINDS
from exprl_jax.layout import check_layout, check_lengths
from exprl_jax.mesh import DATA, make_mesh
from exprl_jax.model import decoder
from exprl_jax.model.lora import adapt
from exprl_jax.records import TrainState
from exprl_jax.reward.checklists import ChecklistJudge
from exprl_jax.reward.judges import AnyJudge, JudgeBuilder
from exprl_jax.reward.routes import ROUTES, RewardRoute
from exprl_jax.reward.rubric import Unit
from exprl_jax.reward.segments import Splitter, segment_rule
from exprl_jax.reward.truth import AnyTruth, open_truth, truth_files
from exprl_jax.reward.verifiers.grading import Graders, check_answers, open_graders, verifier_files
from exprl_jax.rollout.call import Prompts, Sampler, make_prompts, padded_width
from exprl_jax.rollout.hints import FRAME, HintWriter, make_hint_writer
from exprl_jax.rollout.lengths import LengthRecord
from exprl_jax.run.evaluating import Evaluation
from exprl_jax.run.loop import Task
from exprl_jax.run.workdir import Workdir
from exprl_jax.sizes import Lengths, held_bytes, settle_sizes
from exprl_jax.weights.adapters import export_policy
from exprl_jax.weights.language_model import LanguageModel, load_params, open_model
from exprl_jax.weights.run_models import record_models


@dataclasses.dataclass(frozen=True)
class RLRun:
    """What stays the same through a run.

    Attributes:
      problems: those whose prompts are within budget.
      held_out: those that the policy is evaluated on; none where it is not.
      kinds: of the problems, in a fixed order.
      frozen: parameters that never change, by the model they are of; equal models share one entry.
      models: all that the run has opened.
      files: others that the config names and the run has read, by its key and their name.
      hints: writes hints, where the run has any.
      lengths: of the rollouts so far.
    """

    config: Config
    mesh: Mesh
    policy: LanguageModel
    judge: AnyJudge
    truth: AnyTruth
    graders: Graders
    sampler: Sampler
    programs: programs_room.Programs
    problems: Sequence[Problem]
    held_out: Sequence[Problem]
    kinds: Sequence[str]
    prompts: Prompts
    splitter: Splitter
    frozen: Mapping[Model, decoder.Params]
    models: Sequence[LanguageModel]
    files: Mapping[str, Sequence[pathlib.Path]]
    hints: HintWriter | None
    lengths: LengthRecord

    @property
    def base(self) -> Any:
        """What the policy's adapters stand on; nothing where it has none."""
        return self.frozen[self.config.policy] if self.config.lora.rank else ()

    def model(self, state: TrainState) -> Any:
        """The policy as it stands."""
        return adapt(self.config.lora, self.base, state.params)

    def route(self, problem: Problem) -> RewardRoute:
        """What scores the problem's rollouts."""
        return route_of(self.config, problem)


def route_of(config: Config, problem: Problem) -> RewardRoute:
    """What scores the problem's rollouts."""
    return ROUTES[config.routes.of(problem.kind)]


def open_run(config: Config, stack: contextlib.ExitStack) -> RLRun:
    """Opens models and data, and checks that they fit the config and one another.

    Args:
      stack: closes what stays open through the run.

    Raises:
      ValueError: anything about config, data or models that cannot work, in one line.
    """
    mesh = make_mesh(config.mesh)
    check_layout(config, mesh.shape[DATA])
    rule = segment_rule(config)
    policy = open_model(config.policy)
    problems = read_training_problems(config.data, config.reads_references)
    held_out = read_held_out(config, problems)
    check_answers([*problems, *held_out])
    kinds = kinds_of(problems)
    if config.task == "rl":
        _check_routes(config, kinds)
    files = verifier_files(config.grader, kinds_of([*problems, *held_out]))
    builder = _judge_builder(config, problems, held_out, policy)
    programs = programs_room.build(config, mesh, policy)
    check_lengths(config, policy.arch)
    ids = policy_prompts(config, policy.tokenizer, [*problems, *held_out])
    lengths = {name: len(prompt) for name, prompt in ids.items()}
    problems = within_budget("data.max_prompt_tokens", config.data.max_prompt_tokens, problems, lengths)
    check_budget("data.max_prompt_tokens", config.data.max_prompt_tokens, {p.id: lengths[p.id] for p in held_out})
    problems = builder.within_context(problems)
    check_budget("judge.max_context_tokens", config.judge.max_context_tokens, builder.lengths(held_out))
    check_enough(problems, config.rollout.prompts)
    # What can be refused without weights has been; from here on they are loaded, which takes minutes.
    # In one order on every process: loading may run programs over the whole mesh.
    reference = _open_reference(config, policy)
    frozen = _load_frozen(config, mesh, policy, reference)

    def load_judge(model: LanguageModel) -> decoder.Params:
        say(f"judge {model.config.weights}")
        if model.config not in frozen:
            frozen[model.config] = load_params(model, mesh, config.seed)
        return frozen[model.config]

    models = [policy, *([] if reference is None else [reference]), *builder.models]
    if config.task == "rl":  # a distilled run's rows hold its teacher's prompts too
        config = settle_run_sizes(config, mesh, models, [len(ids[p.id]) for p in problems])
    rollout = config.rollout
    judge = builder.open(
        mesh,
        stack,
        load_judge,
        programs_room.build_judge,
        [*problems, *held_out],
        wave=rollout.wave,
        group=rollout.group,
    )
    grades = bool(owned_problems(mesh, rollout.wave).any())
    # One width for all, and for prompts with hints: one program of the sampler serves them.
    prompts = make_prompts({p.id: ids[p.id] for p in (*problems, *held_out)})
    longest = _longest_prompt(config, [len(ids[p.id]) for p in problems])
    prompts = Prompts(prompts.ids, max(prompts.width, padded_width(longest - 1)))
    return RLRun(
        config=config,
        mesh=mesh,
        policy=policy,
        judge=judge,
        truth=_open_truth(config, problems, stack),
        graders=stack.enter_context(open_graders(config.grader, config.code, kinds_of([*problems, *held_out]), grades)),
        sampler=programs_room.build_sampler(
            policy,
            mesh,
            max_tokens=rollout.max_tokens,
            wave=rollout.wave,
            slots=rollout.slots,
            expected_tokens=rollout.expected_tokens,
        ),
        programs=programs,
        problems=problems,
        held_out=held_out,
        kinds=kinds,
        prompts=prompts,
        splitter=Splitter(policy.tokenizer.token_bytes, rule),
        frozen=frozen,
        models=models,
        files={**builder.files, **files, **truth_files(config.truth)},
        hints=_open_hints(config, mesh, reference, frozen, problems, prompts) if rollout.hints else None,
        lengths=LengthRecord(),
    )


def _open_hints(
    config: Config,
    mesh: Mesh,
    base: LanguageModel,
    frozen: Mapping[Model, decoder.Params],
    problems: Sequence[Problem],
    prompts: Prompts,
) -> HintWriter:
    """The frozen base as a writer of hints."""
    hints = config.rollout.hints
    writer = make_hint_writer(
        programs_room.build_hint_sampler(base, mesh, hints=hints, wave=config.rollout.wave),
        frozen[config.reference],
        base.tokenizer,
        prompt_style(config),
        problems,
        prompts,
        hints=hints,
        context=base.arch.max_positions,
        limit=_longest_prompt(config, [len(prompts.ids[p.id]) for p in problems]),
        temperature=config.rollout.temperature,
        seed=config.seed,
    )
    say(f"hints of up to {hints} tokens, from the references of {len(writer.able)} of {len(problems)} problems")
    return writer


def _longest_prompt(config: Config, prompts: Sequence[int]) -> int:
    """The longest that the policy may be given: of these lengths, or with a hint."""
    hints = config.rollout.hints
    return min(config.data.max_prompt_tokens, max(prompts) + hints + FRAME) if hints else max(prompts)


def settle_run_sizes(config: Config, mesh: Mesh, models: Sequence[LanguageModel], prompts: Sequence[int]) -> Config:
    """The config with the sizes of rows and microbatches that it leaves to the program.

    Args:
      models: all of the run, the policy first.
      prompts: tokens of each problem's.
    """
    policy, rollout = models[0], config.rollout
    longest = _longest_prompt(config, prompts) + rollout.max_tokens
    lengths = Lengths(longest, longest, rollout.prompts // config.updates.per_batch * rollout.group)
    abstract, shardings = (
        programs_room.abstract_state(config, policy.arch),
        programs_room.shard_state(config, mesh, policy),
    )
    frozen = {model.config: model.parameter_bytes // mesh.size for model in models[0 if config.lora.rank else 1 :]}
    held = held_bytes(abstract, shardings) + sum(frozen.values())
    return settle_sizes(config, lengths, policy.arch, mesh, held)


def _check_routes(config: Config, kinds: Sequence[str]) -> None:
    """Refuses to ask for the likelihood of answers that are no text which a policy could write.

    Raises:
      ValueError: names the route.
    """
    for kind in kinds:
        if ROUTES[config.routes.of(kind)].answer_likelihood and not KINDS[kind].keeps_answer:
            raise ValueError(
                f"config.routes.{kind}: got {config.routes.of(kind)!r}, expected another route: a policy does "
                f"not write the answers of {KINDS[kind].plural}"
            )


def check_enough(problems: Sequence[Problem], batch: int) -> None:
    """Refuses to run on fewer problems than a step takes.

    Raises:
      ValueError: names the key to lower.
    """
    if len(problems) < batch:
        raise ValueError(
            f"config.rollout.prompts: got {batch}, expected at most {len(problems)}, the problems that are left"
        )


def _judge_builder(
    config: Config, problems: Sequence[Problem], held_out: Sequence[Problem], policy: LanguageModel
) -> JudgeBuilder:
    """The judge of the routes that want one, and of open-ended answers; self-distillation has no rewards."""
    rewarded = problems if config.task == "rl" else []
    graded = problems if config.task == "rl" or config.evaluate.training_problems else []
    return JudgeBuilder(
        config.judge,
        scored=[p for p in rewarded if route_of(config, p).judged],
        verified=[p for p in (*graded, *held_out) if p.traits.by_judge],
        unit=functools.partial(_unit, config),
        opened=policy,
    )


def _open_truth(config: Config, problems: Sequence[Problem], stack: contextlib.ExitStack) -> AnyTruth:
    """What the judge is measured by, about the problems that it scores."""
    judged = [p for p in problems if config.task == "rl" and route_of(config, p).judged]
    return open_truth(config.truth, judged, functools.partial(_unit, config), stack, config.rollout.group)


def _unit(config: Config, problem: Problem) -> Unit:
    """What is scored of the problem's rollouts."""
    return config.judge.unit if route_of(config, problem).per_segment else "outcome"


def _open_reference(config: Config, policy: LanguageModel) -> LanguageModel | None:
    """The KL's reference or the teacher, where the run has one."""
    if not config.has_reference_model:
        return None
    reference = open_model(config.reference, policy)
    if reference.arch != policy.arch or reference.execution != policy.execution:
        raise ValueError("config.reference: expected the policy's architecture and execution; one program serves both")
    return reference


def _load_frozen(
    config: Config, mesh: Mesh, policy: LanguageModel, reference: LanguageModel | None
) -> dict[Model, decoder.Params]:
    """The reference model and the base of adapters, where the run has them."""
    frozen = {}
    say(f"policy {config.policy.weights}")
    if reference is not None:
        frozen[config.reference] = load_params(reference, mesh, config.seed)
        say(f"reference {config.reference.weights}")
    if config.lora.rank and config.policy not in frozen:
        frozen[config.policy] = load_params(policy, mesh, config.seed)
    return frozen


def task_of(run: RLRun, collect: Callable, learn: Callable, evaluation: Evaluation | None) -> Task:
    """The run as the loop sees it; `collect`, `learn` and `evaluation` as in `run.loop.Task`."""
    config, policy = run.config, run.policy
    return Task(
        config=config,
        steps=config.steps,
        parameter_bytes=policy.parameter_bytes,
        abstract=programs_room.abstract_state(config, policy.arch),
        shardings=programs_room.shard_state(config, run.mesh, policy),
        first_state=functools.partial(first_state, run),
        problems=run.problems,
        collect=collect,
        learn=learn,
        updates=config.updates.per_batch,
        all_finite=run.programs.all_finite,
        record_models=functools.partial(_record, run),
        export=functools.partial(export_policy, config.lora, policy, run.base),
        evaluation=evaluation,
        headline="reward" if config.task == "rl" else "accuracy",
        watch=config.watch,
        memory=run.lengths,
    )


def _record(run: RLRun, workdir: Workdir) -> None:
    """Writes down what the run reads, or checks it, and lets a judge that writes checklists go on with its own."""
    record_models(workdir, policy=run.policy, models=run.models, files=run.files)
    if isinstance(run.judge, ChecklistJudge):
        run.judge.checklists.open(workdir.path)


def first_state(run: RLRun) -> TrainState:
    """The state before the first step."""
    return run.programs.init_state(_start(run))


def first_policy(run: RLRun) -> Any:
    """`run.model` of the first state, without its optimizer's moments."""
    return run.model(first_state(run)) if run.config.lora.rank else _start(run)


def _start(run: RLRun) -> decoder.Params:
    """The policy's weights; a frozen copy of them is read once, not twice."""
    params = run.frozen.get(run.config.policy)
    return load_params(run.policy, run.mesh, run.config.seed) if params is None else params
