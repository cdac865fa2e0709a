"""The verbs of the command line as functions: each assembles the parts below it, about a screen long."""
