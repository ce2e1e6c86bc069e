"""The errors that a person can fix.

Each package has a subclass of its own where somebody distinguishes its errors from others; whoever reports errors, a
command, a process or the sensor, catches UserError. Any other exception is a fault of this project, and its traceback
is shown.
"""


class UserError(Exception):
    """Something that a person can fix: the message names it, the reason, and what to do next."""


class TrainingError(UserError):
    """A model cannot be loaded, trained or measured as the recipe asks."""
