"""Python runs this in every process of a server without Tandem that a benchmark starts on a CPU: what `tandem serve`
does there for itself, since the torchvision that comes with a CPU torch may be a CUDA build (rig.py puts this folder on
PYTHONPATH). Must not know: vLLM."""

from worker.utils import torch_setup

torch_setup.prepare()
