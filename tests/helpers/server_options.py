"""How the tests' servers are started, here and on a GPU."""

import torch

GPU = torch.cuda.is_available()
SERVER_OPTIONS = ["--max-model-len", "2048", "--max-num-seqs", "8"]
if GPU:
    # vLLM 0.26 serves the text model of a multi-modal checkpoint only, and needs to be told which kernels to use. With
    # its cache's size said, it does not measure free memory, which other tests beside it change.
    SERVER_OPTIONS += ["--language-model-only", "--gdn-prefill-backend", "triton", "--enable-prefix-caching"]
    SERVER_OPTIONS += ["--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", "2000000000"]
FEEDBACK_KEY = "a key that is long enough".replace(" ", "-")
FEEDBACK_OPTIONS = ["--record", "1", "--record-logprobs", "--feedback"]
