"""Mistakes a user can mend: shown as a line or two on the command line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Says what is wrong, naming the key, file or layer, and what to do about it.

    The command line prints the message alone and exits with code 2.
    """
