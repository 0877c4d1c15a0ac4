"""Several processes: collectives, and what each engine (DDP, FSDP2, ZeRO-1/2, ZeRO-3) leaves of a parameter."""
