"""Error texts that an owner tells the server when it gives up: never what its data was.

Messages of errors name values, which helps whoever owns the data; a message about a row of it must
not leave.  The whole message, with its traceback where it was not foreseen, is in the owner's log.
"""

from __future__ import annotations

from fedsplit.errors import DataError, FedsplitError, SessionError
from fedsplit.owners.home import in_simulation


def tellable(error: Exception) -> FedsplitError:
    """Return the error that the server may be told instead of ``error``.

    Errors of data, and those that nobody foresaw (a library's may quote its input), are reduced to
    their type.  A local simulation has nothing to hide and is told all of its own errors.
    """
    if isinstance(error, FedsplitError) and (in_simulation() or not isinstance(error, DataError)):
        return error
    if isinstance(error, DataError):
        return DataError("this owner's data cannot be used; its own log says why")
    told = f"{type(error).__name__} at the owner"
    return SessionError(f"{told}: {error}" if in_simulation() else f"{told}; its own log says why")
