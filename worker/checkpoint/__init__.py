"""What was learnt, on disk: the journal of batches, checkpoints, and any version rebuilt from both.

In: batches before they are applied, weights after. Out: files in the state directory, and rebuilt weights.
It talks to no Redis and no socket.
"""
