"""Imported once by the fork server of chaos_processes.py: all that a worker and the stand-in would import at start."""

import worker.utils.torch_setup

worker.utils.torch_setup.prepare()  # before transformers looks at torchvision

import stand_in  # noqa: E402
import transformers.models.qwen3_5.modeling_qwen3_5  # noqa: E402
import transformers.models.qwen3_5.tokenization_qwen3_5  # noqa: E402

import worker.orchestrator.worker_loop  # noqa: E402

__all__ = ["stand_in", "transformers", "worker"]
