"""The layer benchmark: what a linear layer with mixout costs beside the ones it replaces."""
