"""Looking at a run: `watch` in a terminal while it runs, `report` as one HTML file, `own` for its division of the pool.

pages     the ranks' /metrics pages, fetched together
rates     a rank's counters as rates and shares of time
records   what a run's folder has recorded
view      both sources as one `View`: the numbers that are shown
bars      bars and curves made of characters
frame     a `View` as lines of a terminal
watch     the loop of `watch`
charts    curves and the heat map as SVG
facts     a run in words and numbers
report    the HTML page
ownership which layer owns which expert, or would
commands  the commands `watch`, `report` and `own`
"""
