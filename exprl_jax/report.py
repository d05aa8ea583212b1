"""The report's door: `python -m exprl_jax.report <workdir> [<workdir> ...] [--output=report.html]`.

Reads what runs and evaluations have written and puts it into one HTML file that needs no network.  A folder that is
neither is named in one line and left out.  What cannot work ends with one line on stderr and exit status 1 (2 for a
wrong command line).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"exprl_jax.report: {message}; for instance: python -m exprl_jax.report runs/smoke\n")


def main(arguments: Sequence[str]) -> int:
    """Writes the report and returns the exit status."""
    parser = _Parser(prog="python -m exprl_jax.report", description=__doc__)
    parser.add_argument(
        "workdirs", metavar="workdir", nargs="+", type=pathlib.Path, help="of a run or of an evaluation"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("report.html"), help="the HTML file to write"
    )
    options = parser.parse_args(arguments)

    from exprl_jax.evaluation.report_page import read_workdirs, render
    from exprl_jax.files import write_atomically

    try:
        contents, left_out = read_workdirs(options.workdirs)
        for reason in left_out:
            _complain(f"{reason}; left out")
        if not contents.runs and not contents.evaluations:
            raise ValueError("nothing to report: give the workdir of a run that has stepped, or of an evaluation")
        page = render(contents)
        write_atomically(options.output, page)
    except (ValueError, OSError) as error:
        _complain(error)
        return 1
    print(f"{options.output}  {len(page.encode()) / 1e6:.1f} MB: {contents.summary()}")
    return 0


def _complain(what: object) -> None:
    print(f"exprl_jax.report: {' '.join(str(what).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
