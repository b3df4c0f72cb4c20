"""Make RUN_DIR/report.html again, of a finished run or of one that is still going on.

    python -m fedmpi.report RUN_DIR [--out FILE]

Exit codes: 0 written, 1 a file is broken or the page could not be written, 2 this is not the folder of a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedmpi import report
from fedmpi.command import FINISHED, guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fedmpi.report", description=__doc__, formatter_class=about)
    parser.add_argument("run_dir", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, default=None, help="where the page goes; default RUN_DIR/report.html")
    given = parser.parse_args(arguments)
    return guarded(lambda: make(given.run_dir, given.out or given.run_dir / "report.html"), "report")


def make(run_dir: Path, page: Path) -> int:
    """Read, draw, write."""
    print(report.save(report.read(run_dir), page))
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
