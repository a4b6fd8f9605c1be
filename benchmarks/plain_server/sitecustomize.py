"""Python runs this in every process of a server without Tandem that a benchmark starts on a CPU: what `tandem serve`
does there for itself, since the torchvision that comes with a CPU torch may be a CUDA build (rig.py puts this folder on
PYTHONPATH). The size of oneDNN's cache stays oneDNN's own. Must not know: vLLM."""

import os

from worker.utils import torch_setup

os.environ.setdefault(torch_setup.ONEDNN_CACHE[0], "1024")
torch_setup.prepare()
