"""One copy of the weights in two processes: shared memory on a CPU, CUDA IPC on a GPU, and what lies beside them.

In: a model in vLLM's process, or the description of one that its socket gives. Out: tensors on the very same memory,
the header (lineage, version, whole or torn) and the record of the batch last applied.
"""
