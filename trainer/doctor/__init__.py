"""What a machine lacks for training, and how to mend it.

findings    a check and what it finds; all checks at once, each in a process of its own with a time limit
host        cores, memory, limits, shared memory, clock, other launchers
software    versions, and the ranges that were tested
gpus        torch and its GPUs, and what nvidia-smi says of them
network     interfaces, ports, the hub
storage     space, speed and rights of folders
"""
