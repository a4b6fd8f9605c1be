"""The trainer's way to vLLM: starts the server, divides the memory, and speaks to its control socket.

In: `tandem serve`'s options, a trainer's calls. Out: a vLLM process, pauses and resumes.
What runs inside vLLM's processes is in `serving.vllm`; nothing else here imports it.
"""
