"""Load, measure, extract and decode models whose weights exist already."""

import os

from models.base.processor import is_crowded

# Threads that wait for each other spin for milliseconds before they sleep, by GNU OpenMP's default: right on
# a quiet machine, where sleeping early costs a fifth of a small model's speed; beside other busy programs
# they spin on cores that the awaited thread needs, and decoding is five times slower. The variable is read
# when that library is loaded, with torch or with our own code, so it is set before both.
if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ and is_crowded():
    os.environ["GOMP_SPINCOUNT"] = "3000"
