"""Servers and models to try things with: a private Redis, a server as a child process, a tiny Qwen3.5, SmolLM2.

In: a folder, options. Out: running processes that end with us, and a model directory.
For the demo, the tests and the benchmarks; the worker itself never imports it.
"""
