#!/bin/sh
# Bet, written before the first run: with pytest 9.2.0 and pytest-xdist 3.8.0, `--dist loadgroup` runs eight tests of one
# xdist_group in one worker.
#
# The bet was wrong: they run in both workers, and nothing is said. xdist writes the group into the private `_nodeid` of a
# test, which this pytest no longer reads. Whoever keeps tests with one expensive service in one group gets the service
# once a worker.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip --disable-pip-version-check -q install pytest==9.2.0 pytest-xdist==3.8.0
cat >"$dir/test_group.py" <<'PY'
import os
import time

import pytest


@pytest.mark.parametrize("n", range(8))
@pytest.mark.xdist_group("one")
def test_one_group(n):
    time.sleep(0.2)
    with open(os.environ["SEEN"], "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PY
cd "$dir"
SEEN=$dir/seen ./env/bin/python -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup test_group.py
workers=$(sort -u seen | wc -l)
echo "pytest $(./env/bin/python -c 'import pytest; print(pytest.__version__)'), xdist $(./env/bin/python -c 'import xdist; print(xdist.__version__)'): one group ran in $workers workers"
[ "$workers" -gt 1 ]
