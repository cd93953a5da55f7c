"""Mixout across processes, on torch's own engines: what one mask for all ranks drops need not travel."""
