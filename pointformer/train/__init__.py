"""Training: recipes, runs in a folder, and reports of runs."""
