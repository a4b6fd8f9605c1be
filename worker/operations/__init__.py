"""What an operator asks of a running Tandem, as plain data and sentences; commands and the page show it.

In: Redis, the server's control socket, the state directory. Out: maps, tables and sentences, for any front.
"""
