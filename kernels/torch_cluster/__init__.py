"""Ops by torch-cluster, for comparison where it is installed."""
