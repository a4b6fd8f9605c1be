"""What runs inside vLLM's processes and what the trainer says to them: plugin, pause, versions in answers, launch."""
