"""Making the bundled networks. `python -m ragged.train`."""
