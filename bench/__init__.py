"""Benchmarks: each prints a ratio against its reference, both measured in the same run."""
