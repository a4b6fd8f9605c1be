"""Puts the rooms together: one update of the live weights, the worker's loop, recovery and rollback.

In: batches from the consumer, the server's weights, the state directory, Redis.
Out: new versions of the weights, each journaled before it is applied and committed after.
"""
