"""Launchers, ranks, rendezvous, liveness, faults, process groups."""
