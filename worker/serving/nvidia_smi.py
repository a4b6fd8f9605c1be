"""What nvidia-smi says of the machine's devices. Must not know: torch, vLLM."""

import subprocess

from worker.serving.vllm_flags import LaunchError


def ask(*fields: str) -> str:
    """A line a device of comma-separated `fields`, memory in MiB. Raises LaunchError with what nvidia-smi said."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or getattr(error, "stdout", None) or error
        raise LaunchError(f"nvidia-smi failed: {str(said).strip()}") from None
