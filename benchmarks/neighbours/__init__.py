"""What the neighbours of mixout cost, each beside its published form."""
