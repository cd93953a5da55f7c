class FinetuneError(Exception):
    """Something the user can mend; the message is one line that says how."""
