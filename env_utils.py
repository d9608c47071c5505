"""Settings of the kit: argument > environment > .env > default. The code is in rerank_kit/settings.py.

python env_utils.py table | example | warnings | shell | get KEY
"""

import sys
from typing import Any

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
    "CFG",  # noqa: F822 these three by __getattr__
    "FIELDS",
    "KIT_DIR",
    "MODEL_PATH",  # noqa: F822
    "MODEL_PATH_TINY",  # noqa: F822
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


def __getattr__(name: str) -> Any:
    """CFG, MODEL_PATH and MODEL_PATH_TINY are read on first use: importing this module does nothing."""
    if name in ("CFG", "MODEL_PATH", "MODEL_PATH_TINY"):
        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
