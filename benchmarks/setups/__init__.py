"""Seventeen setups that people really train, each tiny, built from its package, plain and watched.

`python -m benchmarks.setups.run [NAME...]` prints a table; tests/integration/test_setups.py runs the same list.
"""
