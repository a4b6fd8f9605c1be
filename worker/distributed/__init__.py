"""Several trainers that are one: they find each other, agree, and add up numbers in an order that repeats.

Knows torch.distributed, and nothing of what is trained, of servers or of Redis. What travels is msgpack of bounded
length, and tensors; never a pickle.
"""
