"""Load, measure, extract and decode models whose weights exist already."""

import os

# Threads that wait for each other spin for a moment and then sleep. By itself GNU's OpenMP spins for
# milliseconds, on a core that the awaited thread may need: beside others decoding was six times slower.
# It is read when that library is loaded, with torch or with our own code, so it stands before both.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
