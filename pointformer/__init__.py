"""Irregular tokens: balanced clustering, neighbourhood attention, scored merging."""
