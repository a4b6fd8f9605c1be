"""The worker beside vLLM: it takes transcripts from the queue and trains the weights that vLLM is serving.

Each folder is a room with one job; a room imports only rooms below it (the contracts are in pyproject.toml).
In: jobs from Redis, the server's weights. Out: weights changed in place, and a version in Redis for each change.
"""
