"""Training scripts; run them with `python -m`."""
