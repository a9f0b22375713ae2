"""The ends of a run: what is saved, reported and said then."""
