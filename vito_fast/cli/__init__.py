"""The ``vito-fast`` command."""
