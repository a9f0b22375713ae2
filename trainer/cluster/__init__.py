"""Launchers, rank assignment, rendezvous, liveness, faults, process groups."""
