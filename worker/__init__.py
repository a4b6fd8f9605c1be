"""What runs beside vLLM: drain -> examples -> trainer -> apollo -> weights -> version."""
