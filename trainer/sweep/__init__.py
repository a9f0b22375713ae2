"""Experiments: runs of many recipes and seeds, and what they come to.

spec        the sweep's file, checked at the door, to variants and their runs
runs        which runs are done; `train` in processes of its own for the others
statistics  mean and spread over seeds, paired differences to the baseline
result      from the runs' folders to rows; result.json and result.csv
table       the rows in a terminal
plot        the rows and the runs' curves as pictures
commands    `sweep` of the command line
law         fits of loss against size; law_points, law_result: their data, and what these bear out; law_report,
            law_plot, law_commands: table and words, picture, `law` of the command line
"""
