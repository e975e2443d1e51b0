"""Benchmarks: ``python -m tests.bench.NAME [--json]``; ``python -m tests.bench`` runs them all.

Every figure is a ratio to something measured in the same run, or says what it is. Nothing here fails a test.
"""
