"""Probes of a trained model: what its routing is worth, and how it uses its experts (arXiv:2605.06665).

adapters    the mixture-of-experts layers of a run, an export or a Hugging Face model: seen, and rerouted
text        the held-out text that a probe reads, and the loss on it
randomize   what a layer's learned choice of experts is worth: the loss with random ones
accuracy    the same of the accuracy on tasks
effects     table and panel of both, by layer
reuse       how many different experts a token meets
load        which layer uses which expert, and how differently layers do
redundancy  how alike experts are, in weights and in outputs
output      tables, CSV files and plots
commands    the command line's part
"""
