"""`report`: a run as one HTML file, or several beside one another.

page      the HTML page, and its sections
charts    curves and the heat map as SVG
facts     a run in words and numbers
"""
