"""A run to look at: `watch` in a terminal while it goes on, `report` as one HTML file.

pages.py    the ranks' /metrics pages, fetched together       records.py  what a run's folder has of it
rates.py    counters of a rank to rates and shares            view.py     both to one `View`: the numbers shown
bars.py     bars and sparklines of characters                 frame.py    a `View` to lines of a terminal
watch.py    the loop                                          commands.py the two commands
charts.py   curves as SVG      facts.py  the run in words     report.py   the page
"""
