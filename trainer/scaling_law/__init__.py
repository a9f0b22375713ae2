"""Laws of size: validation loss as a function of pool size, active parameters and depth, fitted to finished sweeps.

points    results of sweeps, grouped into families of variants that differ in size only
law       the mathematics: curves, least squares, what seeds have in common
result    the law of a family: which terms its data supports, and how certain they are
report    table, notes and JSON
plot      picture
commands  the command `law`
"""
