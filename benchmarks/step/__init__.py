"""A whole training step of a transformer under dropout, mixout by the plain formula, and mixout_kernels."""
