"""Make RUN_DIR/report.html again, of a finished run or of one that is still going on.

    python -m fedmpi.report RUN_DIR [--out FILE]

Exit codes: 0 written, 1 the page could not be written, 2 the folder is not one that a run left whole.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedmpi import config, report
from fedmpi.errors import CheckpointError, ConfigError

WRITTEN, FAILED, BAD_FOLDER = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m fedmpi.report", description=__doc__, formatter_class=about)
    parser.add_argument("run_dir", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, default=None, help="where the page goes; default RUN_DIR/report.html")
    given = parser.parse_args(arguments)
    try:
        found = report.read(given.run_dir)
    except (ConfigError, CheckpointError) as error:
        config.fail(error, "report")
        return BAD_FOLDER
    try:
        print(report.save(found, given.out or given.run_dir / "report.html"))
    except CheckpointError as error:
        config.fail(error, "report")
        return FAILED
    return WRITTEN


if __name__ == "__main__":
    sys.exit(main())
