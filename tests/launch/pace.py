"""A hook that gives turns a fixed duration, so that a test has time to do something to a rank."""

import os
import time
from typing import Any

from fedmpi.training import Hook


class Pace(Hook):
    """Sleeps $PACE_S before every step."""

    def before_step(self, step: Any) -> None:
        time.sleep(float(os.environ["PACE_S"]))
