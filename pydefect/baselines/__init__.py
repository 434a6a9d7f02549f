"""Published methods to compare with, one file each, on the same backbones, operators and thresholds.

They are right and fast, and get no further care; ``docs/baselines.md`` says how they compare with other code.
"""
