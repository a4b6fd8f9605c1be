"""How the tests' servers are started, here and on a GPU."""

import torch

from worker.utils import supported_versions

GPU = torch.cuda.is_available()
MULTI_MODAL = GPU or supported_versions.distribution("vllm")[1].startswith("0.26.")
"""Whether the tiny model is the text model of a multi-modal checkpoint: vLLM 0.26 serves no other Qwen3.5."""
SERVER_OPTIONS = ["--max-model-len", "2048", "--max-num-seqs", "8"]
if MULTI_MODAL:
    SERVER_OPTIONS += ["--language-model-only", "--enable-prefix-caching"]
if GPU:
    # vLLM 0.26 needs to be told which kernels to use. With its cache's size said, it does not measure free memory,
    # which other tests beside it change.
    SERVER_OPTIONS += ["--gdn-prefill-backend", "triton"]
    SERVER_OPTIONS += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", "2000000000"]
FEEDBACK_KEY = "a key that is long enough".replace(" ", "-")
FEEDBACK_OPTIONS = ["--record", "1", "--record-logprobs", "--feedback"]
