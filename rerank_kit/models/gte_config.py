"""The configuration class that vLLM asks for by name before it serves gte-multilingual-reranker.

The checkpoint's config.json names a class of this name in code on the hub, which the kit does not run. This module is
copied beside the adapted config.json (served_folder.py); the class holds the values of that config.json only.
"""

from transformers import PretrainedConfig


class NewConfig(PretrainedConfig):
    """config.json of a model of type "new"; every value in it becomes an attribute."""

    model_type = "new"
