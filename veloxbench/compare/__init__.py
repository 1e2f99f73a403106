"""Two revisions in one run: each side in a process of its own, timed in interleaved blocks, judged head by base."""
