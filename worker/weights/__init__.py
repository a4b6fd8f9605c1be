"""Sharing a live vLLM's weights with a trainer: owner side (export), trainer side (attach), and what lies beside them.

Owner side, in vLLM's worker process: `export` (refuses flags that break sharing: `refusals`; derives the mapping:
`mapping`, `recorder`, `names`; shares memory: `memory` over `shm` or `cuda_ipc`; answers on a socket: `service`).
Trainer side, never importing vLLM: `attach`, `bind`, `spot_check`. Without torch: `client`.
"""
