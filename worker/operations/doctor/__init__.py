"""`tandem doctor`'s checks: each looks at one thing and returns what it found, as a `Finding`.

In: Redis, the server's sockets and process, the state directory, the disk, packages' metadata. Out: findings; facts and
numbers, no sentences. Changes nothing it looks at.
"""
