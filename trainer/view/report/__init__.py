"""`report`: a run as one HTML file, or several beside one another.

page        the page of a run
comparison  the page of several runs
parts       figures, lists and tables as HTML
charts      curves and maps as SVG
facts       a run in words and numbers
phases      what the time of a run went into
depth       how the layers of a run differ
"""
