"""From a rollout to the advantages of its tokens: routes, judges, verifiers."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Literal

from exprl_jax.config.models import Model
from exprl_jax.config.values import Count, CountOrNone, Fraction, JsonObject, NotNegative, Number, Seconds, Workers
from exprl_jax.kinds import KINDS

_PER_PROBLEM = "per_problem"
Route = Literal["process", "outcome", "verifier", "likelihood"]


@dataclasses.dataclass(frozen=True)
class Segments:
    """How a rollout is cut into the prefixes that a process judge scores.

    Attributes:
      rule: where segments end: `heading` (line-start `###`), `paragraph`, `line`, `stride:<tokens>` or
        `regex:<pattern>`.
      max_segments: the most segments that a rollout is cut into; later ones are merged into the last.
    """

    rule: str
    max_segments: Count


class _RouteByKind:
    """Where the reward of a problem comes from, by its kind: `choice` has answer choices, the others their domain.

    `process`: the judge scores every prefix or step of a rollout; advantages by `advantage.estimator`.
    `outcome`: the judge scores the whole rollout; advantages by `advantage.rollout_estimator`.
    `verifier`: 1 for a correct answer and 0 for any other; advantages likewise (sparse GRPO).
    `likelihood`: the policy's own mean probability of the answer's tokens after the rollout; advantages likewise.
    """

    def of(self, kind: str) -> Route:
        """What scores the rollouts of a kind of problem."""
        return getattr(self, kind)

    @property
    def all(self) -> set[Route]:
        """The routes that are in use."""
        return set(dataclasses.astuple(self))

    @property
    def reference_free(self) -> bool:
        """Whether no route has any use for reference solutions: these take their rewards from answers alone."""
        return self.all <= {"verifier", "likelihood"}


_ROUTE_MEANINGS = "".join(f"\n  {name}: route of {kind.plural}." for name, kind in KINDS.items())
# One key for each kind of problem that there is.
Routes = dataclasses.make_dataclass(
    "Routes",
    [(name, Route) for name in KINDS],
    bases=(_RouteByKind,),
    frozen=True,
    namespace={"__doc__": f"{inspect.cleandoc(_RouteByKind.__doc__)}\n\nAttributes:{_ROUTE_MEANINGS}\n"},
)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat-completions endpoint.

    Attributes:
      base_url: its URL, up to and including `/v1`.
      model: the model's name there.
      api_key_variable: the environment variable that holds the key; empty for none.
      concurrency: most requests of one process at a time.
      seconds: time limit of one attempt at a request; (retries + 1) times as much ends the request, waits included.
      retries: how often a request is sent again after a failure that may pass.
      max_missing: a batch with a larger fraction of failed requests ends the run.
      budget_key: the name under which the server takes the budget of an answer; OpenAI's newer models take
        `max_completion_tokens` alone.
      extra_body: a JSON object that is sent with every request besides; null leaves a key out, as
        `{"temperature": null}` does for servers that refuse one.
    """

    base_url: str
    model: str
    api_key_variable: str
    concurrency: Count
    seconds: Seconds
    retries: CountOrNone
    max_missing: Fraction
    budget_key: Literal["max_tokens", "max_completion_tokens"]
    extra_body: Annotated[
        str, JsonObject(without=("max_completion_tokens", "max_tokens", "messages", "model", "n", "stream"))
    ]


@dataclasses.dataclass(frozen=True)
class JudgeWorkers:
    """The processes that call a judge's function.

    Attributes:
      count: processes of each process of the run.
      batch: most attempts that the function is given at a time.
      seconds: wall-clock limit of one call of the function; a longer one is killed, and its scores are missing.
      max_missing: a wave with a larger fraction of its scores missing because of killed calls ends the run.
    """

    count: Workers
    batch: Count
    seconds: Seconds
    max_missing: Fraction


@dataclasses.dataclass(frozen=True)
class Judge:
    """The judge and how its score is read.

    Attributes:
      backend: `local`, the `model` on this run's mesh; `openai`, the `endpoint`; or `function`, a `function` of one's
        own.
      model: the judge; equal weights to the reference's are one set of buffers.
      endpoint: where an `openai` judge is.
      function: what a `function` judge calls, `package.module:name` or `path/to/file.py:name` (docs/judges.md);
        read-out and budgets do not apply to it.
      workers: the processes that call it.
      rubric: what the judge is asked: empty for the built-in rubric, a template file of one's own (docs/judges.md), or
        `per_problem`: the judge first writes a checklist from each reference, and scores against that: `text` item by
        item, `logits` in one number.  `per_problem:<file>` does that in the words of a template file.
      checklists: of `per_problem`: a JSONL file of checklists that another run has written (its `checklists.jsonl`);
        problems that are not in it are written anew.  Empty for none.
      unit: what is scored on the route `process`: every `prefix` y_≤t (the paper), or every `step` on its own (the
        released code).
      readout: `text` generates an analysis and parses its last score line; `logits` reads the next-token
        distribution over the digits 1..5 after one forward pass.
      logits_value: the score of `logits`: the `expected` digit or the `argmax`.
      max_tokens: longest `text` judgement.
      max_context_tokens: longest prompt without the trace: rubric, problem, reference, closing instruction and chat
        template; problems beyond it are dropped and counted.
      max_trace_tokens: longest trace, in the judge's own tokens; a longer one gets no score.
      wave: problems that a `local` judge is asked about at a time, a divisor of those that are sampled at a time; it
        bounds the judge's KV cache.  0 for all of them, and where nothing is sampled: what asks about fixed rollouts
        has a `wave` of its own.
    """

    backend: Literal["local", "openai", "function"]
    model: Model
    endpoint: Endpoint
    function: str
    workers: JudgeWorkers
    rubric: str
    checklists: str
    unit: Literal["prefix", "step"]
    readout: Literal["text", "logits"]
    logits_value: Literal["expected", "argmax"]
    max_tokens: Count
    max_context_tokens: Count
    max_trace_tokens: Count
    wave: CountOrNone

    @property
    def per_problem(self) -> bool:
        """Whether each problem has a rubric of its own."""
        return self.rubric == _PER_PROBLEM or self.rubric.startswith(f"{_PER_PROBLEM}:")

    @property
    def template(self) -> str:
        """The file that prompts are made from; empty for the built-in one."""
        return self.rubric.removeprefix(_PER_PROBLEM).removeprefix(":") if self.per_problem else self.rubric

    @property
    def reads_digits(self) -> bool:
        """Whether scores are read from the probabilities of digits."""
        return self.backend != "function" and self.readout == "logits"

    @property
    def source(self) -> str:
        """What judges, in a word: the model, by its weights or its name at the endpoint, or the function."""
        names = {"local": self.model.weights, "openai": self.endpoint.model, "function": self.function}
        return names[self.backend]


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known of rollouts' progress apart from the judge, to measure the judge by: metrics, never rewards.

    Attributes:
      source: empty for none; `column:<name>`, a column of the data that lists the results which a solution reaches;
        or a function, `package.module:name` or `path/to/file.py:name`, as `judge.function` (docs/judges.md).
      workers: the processes that call a function.
    """

    source: str
    workers: JudgeWorkers

    @property
    def function(self) -> str:
        """The function that is called; empty for a column, and for none."""
        return "" if self.source.startswith("column:") else self.source


@dataclasses.dataclass(frozen=True)
class Advantage:
    """From scores to advantages (paper §3; docs/method.md says where the released code differs).

    Attributes:
      estimator: advantages on the route `process`: `delta_norm` (Eq. 2/5), `end_norm` (Eq. 4), `group_norm` (Eq. 6),
        or our own `delta_group`: `delta_norm` whose first segment is compared with the group's first scores.
      one_segment: what `delta_norm` gives a rollout of one segment: `zero`, as the equation says, or its `score`, as
        the released code does.
      rollout_estimator: advantages on the other routes, which have one score a rollout: `grpo` (less the group's mean),
        `rloo` (less the mean of the group's others) or `maxrl` (less the group's mean, divided by it).
      std_normalise: `grpo` divides by the group's standard deviation.
      min_spread: of `rollout_estimator`: a group whose standard deviation is below this gets advantage 0.
      min_logits_spread: the same where the scores are a judge's by `logits`, or likelihoods: they are never quite
        equal, and `std_normalise` would make advantages of 1 out of differences of 0.0001.
      overlong: what happens to rollouts that never ended: `zero_score` (every score 0), `mask` (no loss), `penalty`, or
        `keep` (scored like any other, as in the released sparse runs).
      overlong_penalty: the advantage of every token of an overlong rollout under `penalty`; negative.
      missing: what follows from a score that the judge did not give: `drop_segment` leaves out the segments
        whose advantage needs it, `drop_rollout` the whole rollout.
    """

    estimator: Literal["delta_norm", "end_norm", "group_norm", "delta_group"]
    one_segment: Literal["zero", "score"]
    rollout_estimator: Literal["grpo", "rloo", "maxrl"]
    std_normalise: bool
    min_spread: NotNegative
    min_logits_spread: NotNegative
    overlong: Literal["zero_score", "mask", "penalty", "keep"]
    overlong_penalty: Number
    missing: Literal["drop_segment", "drop_rollout"]


@dataclasses.dataclass(frozen=True)
class Grader:
    """The answer grader (SymPy and pint), and a verifier of one's own, in worker processes.

    Attributes:
      seconds: wall-clock limit for one answer.
      workers: grader processes a host.
      function: what verifies problems of the domain `custom`, `package.module:name` or `path/to/file.py:name`
        (docs/extending.md); empty for none.
    """

    seconds: Seconds
    workers: Workers
    function: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Running the programs of rollouts.

    Attributes:
      seconds: wall-clock limit of one test.
      memory_mb: memory limit of one program, in MB.
      allow_unsandboxed: run programs even where the system offers no isolation.
    """

    seconds: Seconds
    memory_mb: Count
    allow_unsandboxed: bool
