"""Everything that the command line prints as a table."""
