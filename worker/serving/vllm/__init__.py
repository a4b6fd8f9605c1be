"""Runs inside vLLM's processes: what vLLM loads of Tandem.

In: vLLM's engine and model, a trainer's requests. Out: shared weights, pauses, and the versions in answers.
Private names of vLLM are in `private_api` alone.
"""
