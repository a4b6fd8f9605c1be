"""RQ as a queue of micro-batches: takes jobs, forms batches, hands them to a step and settles every job.

In: jobs in Redis, and a step that trains (`config.protocol.Step`). Out: settled jobs, and a committed version a batch.
It imports no torch; all that touches RQ's private parts is in `rq_private` and `jobs`.
"""
