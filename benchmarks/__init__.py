"""Benchmarks: each figure beside a floor that was measured in the same run, as a ratio.

``python -m benchmarks NAME …`` prints one JSON line per figure. What the figures mean, and what
was measured, is in ``docs/performance.md``. Nothing here decides whether a test passes.
"""
