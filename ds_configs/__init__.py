"""DeepSpeed configurations by role and ZeRO stage; "auto" is filled by trainer/engine.py."""
