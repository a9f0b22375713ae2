"""Probes of a trained model (arXiv:2605.06665): what its routing is worth, and how it uses its experts.

adapters    finds the mixture-of-experts layers of a run, an export or a Hugging Face model; observes and reroutes them
text        the text that a probe reads
randomize   the loss with random experts: what a layer's learned choice is worth
accuracy    the accuracy on tasks with random experts
effects     table and plot of both, by layer
reuse       how many distinct experts a token meets
load        which layer uses which expert, and how layers differ
redundancy  how similar experts are, in weights and outputs
commands    `probe` on the command line; writes tables, JSON, CSV files and plots
"""
