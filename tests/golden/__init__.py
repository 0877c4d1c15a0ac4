"""Golden digests: masks and weights that runs of tiny models end with, bit for bit.

``digests.json`` holds a hash of each scenario's masks and of its weights. Code that computes the same gives the same
hashes; a change that alters one says why in its commit. ``python -m tests.golden check`` compares, and so does
``test_golden.py``; ``python -m tests.golden record`` writes the file anew.

Floating point differs between kinds of CPUs and versions of libraries, so hashes are compared only where both are those
of the recording (``digests.fingerprint``). Elsewhere, record at the commit before a change, and check after it.
"""
