"""The one exception that is meant for a person's eyes."""


class UserError(ValueError):
    """A mistake its maker can mend: one sentence that names the thing and the remedy.

    The command line prints the sentence and exits with 2; a traceback means a fault of ours.
    """

    agreed = False
    """Whether the processes of a run have agreed that this one tells it."""


class ToldElsewhereError(UserError):
    """A mistake that another process of the run tells."""
