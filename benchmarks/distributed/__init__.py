"""Training steps of two processes over a network of a known speed: plain DDP and FSDP2, and what mixout spares them."""
