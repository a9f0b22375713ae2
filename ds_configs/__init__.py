"""DeepSpeed configurations by role and ZeRO stage; "auto" is filled by trainer/engine/role_engine.py."""
