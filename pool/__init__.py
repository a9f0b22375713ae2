"""The pool: experts, permutation, placement, the wire and the service. Knows no routers and no DeepSpeed."""
