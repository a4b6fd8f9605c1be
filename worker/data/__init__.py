"""From a transcript to rows of tokens with an exact mask.

In: transcripts, a tokenizer with its chat template. Out: examples, and batches of a few fixed shapes.
It knows no Redis and no server.
"""
