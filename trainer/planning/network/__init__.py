"""What travels between ranks, and how long that takes: tokens, gradients, and what the hosts tell each other."""
