"""A method that vLLM's worker class gains (`--worker-extension-cls`): wait until the device is idle.

vLLM 0.26 reports a pause while the last kernels may still run; newer versions synchronize by themselves, where this
costs one empty round trip.
"""

import torch


class TandemWorkerExtension:
    """Mixed into vLLM's worker; called by name through EngineClient.collective_rpc."""

    def tandem_synchronize(self) -> None:
        """Return once every kernel that was launched on this worker's device has ended. A no-op on the CPU."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
