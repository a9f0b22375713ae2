"""Looking at a run: `watch` in a terminal while it runs, `own` for its division of the pool, `load_run` in Python.

report    a run, or several beside one another, as one HTML file
pages     the ranks' /metrics pages, fetched together
rates     a rank's counters as rates and shares of time
records   what a run's folder has recorded
view      both sources as one `View`: the numbers that are shown
bars      bars and curves made of characters
frame     a `View` as lines of a terminal
watch     the loop of `watch`
ownership which layer owns which expert, or would
run       `load_run`: a run, a checkpoint or an export as Python objects
commands  the commands `watch`, `report` and `own`
"""
