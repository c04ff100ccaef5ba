"""Benchmarks, each against a baseline that runs interleaved with it."""
