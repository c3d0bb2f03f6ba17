"""Errors that are for the user, and the exit codes they end in.

Exit codes: 0 done, 1 error, 2 usage, 75 stopped after a checkpoint, or a peer was lost (run the same command again).
"""

EXIT_DONE, EXIT_ERROR, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75


class DistlmError(Exception):
    """A fault the user can mend: the message names the file or field, its value, and the mend.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = EXIT_ERROR
    shared = False
    """Every rank raises this same error, so one rank prints it and all can leave in order."""


class UsageError(DistlmError):
    """The command line or a recipe is wrong: unknown key, wrong type, missing argument."""

    exit_code = EXIT_USAGE


class Busy(DistlmError):
    """Another run is at work in the folder and owns what is in it."""


class Diverged(DistlmError):
    """Raised on every rank where numbers of a training are infinite or NaN. It says what is; what helps is for the
    training to say (Job.calmer), whose settings have names of their own."""

    shared = True


class Stopped(DistlmError):
    """Raised on every rank after a stop signal was agreed and all finished work is on disk."""

    exit_code = EXIT_STOPPED
    shared = True
