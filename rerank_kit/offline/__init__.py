"""Pairs to scores without a server: vllm.LLM in this process, files in and out."""
