"""The report's door: `python -m exprl_jax.report <workdir> [<workdir> ...] [--output=report.html] [--png=curves.png]`.

Reads what runs and evaluations have written and puts it into one HTML file that needs no network; with `--png` the
curves of the evaluations inside the runs into a picture besides.  A folder that is neither is named in one line and
left out.  What cannot work ends with one line on stderr and exit status 1 (2 for a wrong command line).
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
    parser.add_argument("--png", type=pathlib.Path, help="a picture of pass@1 and unsolved problems over steps")
    options = parser.parse_args(arguments)

    from exprl_jax.evaluation.curves import write_curves
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
        if options.png is not None:
            write_curves(contents.runs, options.png)
    except (ValueError, OSError) as error:
        _complain(error)
        return 1
    print(f"{options.output}  {len(page.encode()) / 1e6:.1f} MB: {contents.summary()}")
    if options.png is not None:
        print(options.png)
    return 0


def _complain(what: object) -> None:
    print(f"exprl_jax.report: {' '.join(str(what).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
