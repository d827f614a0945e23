"""Measuring: clocks, the recorder, the suites, the report, and the paper beside them. `python -m ragged.bench`."""
