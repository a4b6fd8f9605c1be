"""Small tools that know nothing of training: Unix sockets, signals, crash points, supported versions, the budget.

In and out: whatever each file says. It imports no other room.
"""
