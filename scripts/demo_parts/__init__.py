"""The parts of scripts/demo.py: its two stories, and what they share."""
