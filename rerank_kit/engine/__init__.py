"""Chooses vLLM's arguments by model, machine and settings, and gives the reason for each choice."""
