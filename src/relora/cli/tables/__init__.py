"""Tables and summary lines that the verbs print for people; each function takes the console to print on.

Without one it prints on standard output.
"""
