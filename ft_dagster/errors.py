"""The errors that a user can fix.

A package defines a subclass of its own where callers need to tell its errors apart from others. The code that reports
errors (a command, a process or the sensor) catches UserError. Any other exception is a bug in this project, and its
traceback is shown.
"""


class UserError(Exception):
    """An error that the user can fix. Its message names the problem, the reason and the next step."""


class TrainingError(UserError):
    """A model cannot be loaded, trained or evaluated as the recipe asks."""
