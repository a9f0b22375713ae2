"""Experiments: runs of many recipes with several seeds, and their comparison.

spec        the file of a sweep, its variants and their runs
runs        which runs are finished; training the others in processes of their own
statistics  mean and spread over seeds, paired differences to the baseline
result      the result of the finished runs: result.json and result.csv
table       the result in a terminal
plot        the result as pictures
commands    the command `sweep`
"""
