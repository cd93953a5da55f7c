class CommandError(Exception):
    """Something that the user of a command can fix; the message is one line that says how."""
