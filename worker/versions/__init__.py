"""Versions of the weights in Redis: committed once, compared with the weights at a start, paused by a person.

In: what a batch did, the header beside the weights. Out: version, manifests, ledger and events,
one transaction a version. It imports no torch and no RQ.
"""
