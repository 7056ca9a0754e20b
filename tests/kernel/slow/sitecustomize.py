"""Makes workers pause between lookup and verdict, for a random time up to `PORTWARD_TEST_PAUSE` seconds, so that
the policy can change in between. Python imports this at its start if PYTHONPATH names this folder."""

import os
import random
import time

from portward.table.reader import Reader

_lookup = Reader.lookup
_LONGEST = float(os.environ["PORTWARD_TEST_PAUSE"])


def _slow(self, index, source):  # type: ignore[no-untyped-def] # stands in for Reader.lookup
    found = _lookup(self, index, source)
    time.sleep(random.random() * _LONGEST)  # pause: between lookup and verdict
    return found


Reader.lookup = _slow  # type: ignore[method-assign] # that is the point
