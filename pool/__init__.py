"""The pool: experts, permutation, placement, the wire and the service. It knows nothing about routers or DeepSpeed."""
