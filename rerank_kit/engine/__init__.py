"""Model + machine + settings -> vLLM's arguments, each choice with its reason."""
