"""Imported last by the server of forked ranks: see `tests.distributed`."""

import gc

# Else the first full collection of every rank visits, and so copies, all that the server has imported: half a second.
gc.freeze()
