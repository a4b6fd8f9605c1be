"""Forward, backward and the optimizer's step on given parameters, with the guards that refuse a batch.

In: examples and a model whose parameters may be shared with a server. Out: a loss, gradients, changed parameters.
It knows no Redis, no server and no version.
"""
