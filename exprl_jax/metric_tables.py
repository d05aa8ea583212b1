"""The tables of docs/metrics.md, made from the code that computes the metrics:

    python -m exprl_jax.metric_tables docs/metrics.md

writes anew what stands between `<!-- metrics: <table> -->` and `<!-- end -->` of a page, and leaves its prose alone.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Mapping

from exprl_jax.files import write_atomically
from exprl_jax.learning import distillation, supervised, update
from exprl_jax.reward import statistics
from exprl_jax.rollout import usage
from exprl_jax.run import evaluating
from exprl_jax.text_tables import markdown

TABLES: Mapping[str, Mapping[str, str]] = {
    "rollouts": statistics.METRICS,
    "sampling": usage.METRICS,
    "updates": update.METRICS,
    "distillation": distillation.METRICS,
    "evaluation": evaluating.METRICS,
    "supervised": supervised.METRICS,
    "validation": supervised.VALIDATION,
    "judge_validation": supervised.JUDGE_VALIDATION,
}
# Of each task, the tables that its rows of metrics are made of; a later one has the last word.
_OF_TASK = {
    "rl": ("rollouts", "sampling", "updates", "evaluation"),
    "distill": ("rollouts", "sampling", "updates", "evaluation", "distillation"),
    "sft": ("supervised", "validation"),
    "judge": ("supervised", "validation", "judge_validation"),
}
_BLOCK = re.compile(r"(?<=<!-- metrics: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def explanations(task: str) -> dict[str, str]:
    """What each metric of a task is; nothing for tasks without metrics."""
    return {key: text for table in _OF_TASK.get(task, ()) for key, text in TABLES[table].items()}


def rewrite(page: str) -> str:
    """The page with its tables as the code has them.

    Raises:
      ValueError: it has not each table once.
    """
    blocks = {
        name: markdown([["key", "what"], *([f"`{key}`", text] for key, text in table.items())])
        for name, table in TABLES.items()
    }
    blocks["by_kind"] = ", ".join(f"`{key}`" for key in statistics.BY_KIND)
    present = [match[1] for match in _BLOCK.finditer(page)]
    if sorted(present) != sorted(blocks):
        raise ValueError(
            f"the page has the tables {', '.join(present) or 'none'}; expected each of {', '.join(blocks)} once, "
            "between <!-- metrics: NAME --> and <!-- end -->"
        )
    return _BLOCK.sub(lambda match: f"{match[1]}{match[2]}\n{blocks[match[1]]}\n\n", page)


def main(arguments: list[str]) -> int:
    """Rewrites a page and returns the exit status."""
    if len(arguments) != 1:
        print("exprl_jax.metric_tables: expected one page, docs/metrics.md", file=sys.stderr)
        return 2
    path = pathlib.Path(arguments[0])
    try:
        write_atomically(path, rewrite(path.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        print(f"exprl_jax.metric_tables: {path}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
