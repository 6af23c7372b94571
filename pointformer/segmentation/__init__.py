"""Pictures to objects: `segment`, windows and their seams, and how results are drawn."""
