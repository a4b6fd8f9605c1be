"""The one base of every error that Tandem raises on purpose.

`str(error)` is one clear sentence for a user: it names the field, the file or the flag, and says what to do.
Anything else that escapes is a bug and keeps its traceback.
"""


class TandemError(Exception):
    """Base class of Tandem's own errors; the command line prints it as `error: ...` and exits 1."""
