"""Python imports this at its start where PYTHONPATH names this folder: workers then wait between the look-up
and the verdict, for up to `PORTWARD_TEST_PAUSE` seconds at random. So a policy can change just there."""

import os
import random
import time

from portward.table.reader import Reader

_lookup = Reader.lookup
_LONGEST = float(os.environ["PORTWARD_TEST_PAUSE"])


def _slow(self, index, source):  # type: ignore[no-untyped-def] # stands in for Reader.lookup
    found = _lookup(self, index, source)
    time.sleep(random.random() * _LONGEST)  # pause: what this file is for
    return found


Reader.lookup = _slow  # type: ignore[method-assign] # that is the point
