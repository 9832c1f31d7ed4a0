"""Benchmarks: ``make bench``. Ratios of runs in turn, with their spread; absolute figures are this machine's."""
