"""Implementations by torch-scatter, for comparison."""
