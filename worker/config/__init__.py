"""What a user can choose, with its defaults and flags, and the protocol between consumer and trainer.

In: options of a command line. Out: frozen dataclasses. It imports no torch, so that `--help` is quick.
"""
