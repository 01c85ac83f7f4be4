"""What goes wrong with data that lie outside the program."""


class NotPreparedError(FileNotFoundError, ValueError):
    """The data set asked for is not in the directory, or not in a form that can be read."""


class UnreadableError(ValueError):
    """A file of a data set is damaged, gone, or not what it should be; the message names it."""
