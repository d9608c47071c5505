#!/bin/sh
# The whole test suite from nothing: sets up .venv as a user would, adds the test tools, checks style, runs pytest.
#   sh tests/run.sh [pytest arguments]
set -eu
KIT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$KIT"
sh start_rerank.sh setup
PY=$(sh start_rerank.sh python)
"$PY" -m pip --disable-pip-version-check install --quiet -r requirements-dev.txt
# Other projects' clients have an environment of their own: what they need does not go together with vLLM.
SDK=.venv-sdk
if ! cmp -s tests/requirements-sdk.txt "$SDK/installed.txt"; then
  "$PY" -m venv "$SDK"
  "$SDK/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps -r tests/requirements-sdk.txt
  "$SDK/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target "$SDK/cohere-7" cohere==7.3.1
  cp tests/requirements-sdk.txt "$SDK/installed.txt"
fi
# Linter, second shell, logrotate, systemd-analyze, nginx and Prometheus come from the system; the tests name what is
# missing.
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  for tool in shellcheck busybox logrotate systemd-analyze curl nginx promtool; do
    command -v "$tool" >/dev/null 2>&1 || [ -x "/usr/sbin/$tool" ] && continue
    case $tool in systemd-analyze) package=systemd ;; nginx) package=nginx-light ;; promtool) package=prometheus ;; *) package=$tool ;; esac
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package"; } >/dev/null
  done
fi
"$PY" -m ruff check .
"$PY" -m ruff format --check .
shellcheck start_rerank.sh deploy/switch_model.sh tests/run.sh .ci/run
exec "$PY" -m pytest -m "not gpu and not soak" "$@"
