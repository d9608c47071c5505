"""Settings of the kit: argument > environment > .env > default. The code is in rerank_kit/settings.py.

python env_utils.py table | example | warnings | shell | get KEY
"""

import sys
from typing import TYPE_CHECKING

from rerank_kit import settings
from rerank_kit.settings import (
    FIELDS,
    KIT_DIR,
    ConfigError,
    EnvConfig,
    env_example,
    get_config,
    load_env,
    main,
    markdown_table,
    passed_on_env,
    warnings_of,
)

__all__ = [
    "CFG",
    "FIELDS",
    "KIT_DIR",
    "MODEL_PATH",
    "MODEL_PATH_TINY",
    "ConfigError",
    "EnvConfig",
    "env_example",
    "get_config",
    "load_env",
    "main",
    "markdown_table",
    "passed_on_env",
    "warnings_of",
]


CFG: EnvConfig  # these three have a type here and a value by __getattr__
MODEL_PATH: str
MODEL_PATH_TINY: str
if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that __getattr__ knows

    def __getattr__(name: str) -> EnvConfig | str:
        """CFG, MODEL_PATH and MODEL_PATH_TINY are read on first use: importing this module does nothing."""
        if name in ("CFG", "MODEL_PATH", "MODEL_PATH_TINY"):
            return getattr(settings, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
settings.warn_of_edits(__name__, globals())
