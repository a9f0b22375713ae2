"""DeepSpeed, and the experts of a rank."""
