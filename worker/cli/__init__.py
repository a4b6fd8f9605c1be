"""The commands: one file a subcommand of `tandem`, flags and printed lines only.

In: the command line. Out: calls into the rooms below, and lines for a person.
"""
