#!/bin/sh
# The whole test suite from nothing: sets up .venv as a user would, adds the test tools, checks style, runs pytest.
#   sh tests/run.sh [--coverage] [pytest arguments]
# Without a file, -m or -n the suite runs in two parts: four tests at a time, then those that measure time.
#   sh tests/run.sh                                   all but what needs a GPU or many minutes
#   sh tests/run.sh --coverage                        and print the lines of the kit that no test reaches (slower)
#   sh tests/run.sh -x --durations=25                 options of pytest
#   sh tests/run.sh tests/docs/test_docs.py              one file; also FILE::TEST
#   sh tests/run.sh -m soak                           what runs for many minutes; -m gpu: what needs a GPU
set -eu
KIT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
cd "$KIT"

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; }

COVERAGE='' WHOLE=yes
[ "${1:-}" != --coverage ] || { COVERAGE=yes; shift; }
for word in "$@"; do
  case $word in
    -h | --help) usage; exit 0 ;;
    -m* | -n* | -p) WHOLE='' ;;
    -*) ;;
    *) [ ! -e "${word%%::*}" ] || WHOLE='' ;;
  esac
done

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
# The library that `check --reference` asks, beside the serving environment.
REFERENCE=models/sentence-transformers
if ! cmp -s requirements-reference.txt "$REFERENCE/installed.txt"; then
  "$PY" -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target "$REFERENCE" -r requirements-reference.txt
  cp requirements-reference.txt "$REFERENCE/installed.txt"
fi
# JavaScript clients, where npm is installed; their tests say so where it is not.
if command -v npm >/dev/null 2>&1 && ! cmp -s tests/sdk-js/package-lock.json "$SDK/js/package-lock.json"; then
  mkdir -p "$SDK/js"
  cp tests/sdk-js/package.json "$SDK/js/"
  cp tests/sdk-js/package-lock.json "$SDK/js/new-lock.json"
  (cd "$SDK/js" && mv new-lock.json package-lock.json && npm ci --silent --ignore-scripts --no-fund --no-audit) ||
    { rm -f "$SDK/js/package-lock.json"; printf '[WARN] %s\n' "npm ci failed: the tests of JavaScript clients cannot run" >&2; }
fi
# Linter, second shell, logrotate, systemd-analyze, nginx, Prometheus and Redis come from the system; the tests name what is
# missing.
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
  for tool in shellcheck busybox logrotate systemd-analyze curl nginx promtool redis-server; do
    command -v "$tool" >/dev/null 2>&1 || [ -x "/usr/sbin/$tool" ] && continue
    case $tool in systemd-analyze) package=systemd ;; nginx) package=nginx-light ;; promtool) package=prometheus ;; *) package=$tool ;; esac
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$package"; } >/dev/null
  done
fi
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
shellcheck start_rerank.sh rerank_kit/setup.sh deploy/switch_model.sh tests/run.sh .ci/run

# One part of the suite. It may have nothing to run (pytest's exit code 5), but not both.
part() {
  code=0
  "$PY" -m pytest "$@" || code=$?
  case $code in
    0) RAN=yes ;;
    5) ;;
    *) RAN=yes FAILED=$code ;;
  esac
}

if [ -z "$WHOLE" ]; then
  [ -z "$COVERAGE" ] || set -- --cov "$@"
  exec "$PY" -m pytest -m "not gpu and not soak" "$@"
fi
FAILED=0 RAN=''
part -m "not gpu and not soak and not timing" -n 4 ${COVERAGE:+--cov --cov-report=} "$@"
# They wait most of the time: three together leave more than half of two cores idle.
part -m "timing and not gpu and not soak" -n 3 ${COVERAGE:+--cov --cov-append} "$@"
[ -n "$RAN" ] || { printf '[ERR] %s\n' "no test was selected by: $*" >&2; exit 5; }
exit "$FAILED"
