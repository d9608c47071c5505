#!/bin/sh
# One reranker service on vLLM: set up, start, watch and stop it, call it, measure it.
#   sh start_rerank.sh ACTION
#
# First steps
#   setup         installs vLLM into .venv
#   demo          does setup and start, then scores an example
#   example       ranks three documents by the running service (main.py)
# The service
#   start         starts the service and waits until it is ready
#   stop          lets calls in flight finish, then ends the service
#   restart       does stop, then start
#   run           serves in the foreground, for systemd and containers
# Look at it
#   status        prints the state in one line, with --json all of it
#   wait          waits until the service is ready or dead
#   wait-for PID  waits for the server that "run" became
#   healthy       asks /ready, for the health check of a container
#   check         checks that the scores are right, with --reference against transformers, with --exact in other batches
#   quality PATH  measures how well it ranks, on judgements; more options as in docs/quality.md
#   tail          follows the log
#   cfg           explains the settings, every automatic choice and the vllm command
# Work with it (options: ACTION --help)
#   bench ...     measures the running service (bench_rerank.py)
#   score ...     scores a file of pairs without a service (vllm_usage.py)
#   python        prints the Python that serves
#   help          prints this text
#
# Settings: environment > .env > default, see .env.example. Write them there, not into this script.
# Exit codes: 0 done, 1 failed, 2 usage, 5 vllm not installed, 6 not configured.
# Exit codes of status: 0 ready, 1 dead with a PID file, 3 not running, 4 of another host or user, 150 not ready yet.
# Exit codes of wait: 0 ready, 1 dead, 3 not running, 150 not ready after START_TIMEOUT_S.
# Exit codes of check: 0 nothing wrong, 1 the scores cannot be right, 4 the check could not be made.
set -u

KIT=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd -P) || exit 1
VENV=$KIT/.venv
DONE_FILE=$VENV/.kit-complete

say() { printf '%s\n' "$*"; }
warn() { printf '[WARN] %s\n' "$*" >&2; }
err() { printf '[ERR] %s\n' "$*" >&2; }
die() { code=$1; shift; err "$*"; exit "$code"; }

# --- Python and the configuration -------------------------------------------------------------------------------------

# Returns 0 if this Python has a vLLM that the kit can use, 3 if it is only new enough. The kit's own .venv counts after a
# complete setup.
fits() {
  [ -x "$1" ] || return 1
  "$1" -P -c 'import sys
if not (3, 11) <= sys.version_info[:2] < (3, 15): sys.exit(1)
try:
    from importlib.metadata import version
    v = tuple(int(n) for n in version("vllm").split("+")[0].split(".")[:2])
except Exception: v = (0, 0)
sys.exit(0 if v >= (0, 26) else 3)' 2>/dev/null || return
  case $1 in "$VENV"/*) [ -f "$DONE_FILE" ] || return 3 ;; esac
}

new_enough() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; }

# Sets PY to the Python that serves: the first of $PYTHON, the active environment, .venv and python3 on PATH that has a
# fitting vLLM. If none has, PY is a Python that can read the configuration, and HAVE_VLLM is empty.
find_python() {
  HAVE_VLLM=yes
  if [ -n "${PYTHON:-}" ]; then
    PY=$(command -v "$PYTHON") || die 5 "PYTHON=$PYTHON is not a program"
    fits "$PY"
    case $? in
      0) ;;
      3) HAVE_VLLM= ;;
      *) die 5 "PYTHON=$PYTHON is not a Python 3.11 to 3.14, which the kit needs: set another one, or unset PYTHON" ;;
    esac
    return 0
  fi
  path_python=$(command -v python3 || :)
  for PY in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python" "$VENV/bin/python" "$path_python"; do
    fits "$PY" && return 0
  done
  HAVE_VLLM=
  for PY in "${VIRTUAL_ENV:-}/bin/python" python3 python3.14 python3.13 python3.12 python3.11; do
    PY=$(command -v "$PY") && new_enough "$PY" && return 0
  done
  die 5 "Python 3.11 to 3.14 is needed and none is on PATH: install one (e.g. apt install python3.11 python3.11-venv)"
}

# Runs a module of the kit. With -P Python does not search the caller's folder for modules.
kit() { module=$1; shift; PYTHONPATH=$KIT${PYTHONPATH:+:$PYTHONPATH} "$PY" -P -m "rerank_kit.$module" "$@"; }

# The same, and it replaces this shell.
become_kit() { module=$1; shift; exec env PYTHONPATH="$KIT${PYTHONPATH:+:$PYTHONPATH}" "$PY" -P -m "rerank_kit.$module" "$@"; }

load_config() {
  values=$("$PY" "$KIT/env_utils.py" shell) || exit 6
  # A setting that was written into this script is no environment: older versions were configured so.
  for key in $(printf '%s\n' "$values" | sed -n 's/^\([A-Z_]*\)=.*/\1/p'); do
    eval "edited=\${$key-}"
    [ -z "$edited" ] || [ "$(printenv "$key")" = "$edited" ] || warn "$key=$edited in start_rerank.sh has no effect: write $key=$edited into .env"
  done
  eval "$values" # lines KEY='value', and warn 'text' for each key of .env that no code reads
  PID_FILE=$LOG_DIR/rerank-$PORT.pid
  STATE_FILE=$LOG_DIR/rerank-$PORT.state
  LOCK_FILE=$LOG_DIR/rerank-$PORT.lock
  LOG_FILE=$LOG_DIR/rerank-$PORT.log
}

need_vllm() {
  [ -n "$HAVE_VLLM" ] && return 0
  for old in "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python"; do
    if [ -x "$old" ] && ! new_enough "$old"; then
      warn "the active environment is left out: $old is not a Python 3.11 to 3.14, which the kit needs"
    fi
  done
  kit serving.command vllm
  exit 5
}

# A client runs without vLLM too, where its Python has these packages.
need_packages() {
  [ -n "$HAVE_VLLM" ] && return 0
  for name in "$@"; do
    "$PY" -c "import $name" 2>/dev/null || die 5 "$PY has no package $name: run \"sh start_rerank.sh setup\", or pip install $* there"
  done
}

# --- processes --------------------------------------------------------------------------------------------------------

# Start time of a process in clock ticks. PIDs are reused; PID and start time together identify a process.
born() {
  [ -n "$1" ] && read_stat "/proc/$1/stat" || return 1
  # shellcheck disable=SC2086 # split into fields on purpose
  set -- $fields
  [ "${1-Z}" != Z ] && [ $# -gt 19 ] && shift 19 && printf '%s\n' "$1"
}

# Sets fields to those of a stat file after the name, which may hold spaces, brackets and even a newline.
read_stat() {
  { read -r fields <"$1"; } 2>/dev/null || return 1
  case $fields in *") "*) ;; *) fields=$(cat "$1" 2>/dev/null) || return 1 ;; esac
  fields=${fields##*) }
}

# Sleeps a tenth of a second and counts it in waited, or a whole one where sleep takes no fractions.
nap() { if sleep 0.1 2>/dev/null; then waited=$((waited + 1)); else sleep 1; waited=$((waited + 10)); fi; }

# Waits up to $1 seconds for the end of the process that a PID and its start time name.
wait_for_end() {
  waited=0
  while [ -n "$3" ] && [ "$(born "$2")" = "$3" ]; do
    [ "$waited" -lt $(($1 * 10)) ] || return 1
    nap
  done
}

# Host, boot and PID namespace: elsewhere a PID names another process (this_machine() in rerank_kit/processes.py).
this_machine() {
  printf '%s:%s:%s' "$(uname -n)" "$(cat /proc/sys/kernel/random/boot_id)" "$(readlink /proc/self/ns/pid)"
}

# Sets pid and since from the PID file. Fails if there is none, or if it was written before a reboot or in another
# container, because its PID may belong to another process now.
read_pid_file() {
  [ -f "$PID_FILE" ] && read -r pid since where <"$PID_FILE" || return 1
  [ -z "$where" ] || [ "$where" = "$(this_machine)" ]
}

# Prints the PID of our supervisor. Fails if it is gone or the PID belongs to another process now.
server_pid() {
  read_pid_file || return 1
  [ -n "$since" ] && [ "$(born "$pid")" = "$since" ] && printf '%s\n' "$pid"
}

# Prints the PID of a server whose supervisor was killed. Fails if there is none.
lone_server() { [ -f "$STATE_FILE" ] && kit serving.status server-pid; }

# Refuses a PID file of another host that shares LOG_DIR: the service would look dead from here.
refuse_other_host() {
  [ -f "$PID_FILE" ] && read -r pid since where <"$PID_FILE" || return 0
  case ${where:-$(this_machine)} in "$(uname -n)":*) return 0 ;; esac
  die 1 "$PID_FILE belongs to a service that host ${where%%:*} started: give each host a LOG_DIR of its own (or remove the file if that host is gone or was renamed)"
}

# PIDs of our session: supervisor, server, engine and workers. Works after the death of the supervisor too.
session_pids() {
  read_pid_file || return 0
  now=$(born "$pid") && [ "$now" != "$since" ] && return 0
  for file in /proc/[0-9]*/stat; do
    read_stat "$file" || continue
    # shellcheck disable=SC2086 # split into fields on purpose
    set -- $fields
    case "${4-} $1" in "$pid Z") continue ;; "$pid "*) ;; *) continue ;; esac
    file=${file#/proc/}
    printf '%s\n' "${file%/stat}"
  done
}

# Allows one start or stop at a time for a port. The lock file names its owner, the script and the action. The owner is the
# shell of the action: it may run on when the script was killed. The lock is void when the owner is gone. flock makes reading and writing it atomic. It is not held longer: processes started from here would
# inherit it. A start that only waits for the model holds no lock; one that still prepares gives way to a stop.
take_lock() {
  try_lock "$1"
  code=$?
  if [ "$code" = 2 ] && [ "$1" = stop ] && [ "${said##* }" = start ]; then
    script=${said%% *} owner=${said#* }
    owner=${owner%% *}
    warn "ending the start that is under way (PID $script)"
    since=$(born "$owner")
    # The script ends its action at once. Without it the action's shell would run a trap only after its command.
    if [ "$script" != "$owner" ]; then kill -TERM "$script" 2>/dev/null; else end_family "$owner"; fi
    wait_for_end 10 "$owner" "$since"
    try_lock "$1"
    code=$?
  fi
  case $code in
    0) ;;
    2) die 1 "another start or stop for port $PORT is under way (PID ${said%% *})" ;;
    *) die 1 "$LOCK_FILE cannot be locked ($said): make room if the disk is full, remove the file if it belongs to another user, or set LOG_DIR to a local folder" ;;
  esac
}

# Returns 0 with the lock, 2 with "SCRIPT OWNER ACTION" in said (both PIDs are the owner's if the script is gone), 1 with
# the fault in said.
try_lock() {
  [ -d "$LOG_DIR" ] || { mkdir -p "$LOG_DIR" && chmod 700 "$LOG_DIR"; } || die 1 "LOG_DIR=$LOG_DIR cannot be created"
  # Whoever can write there can have any process killed by means of a forged PID file.
  case $(LC_ALL=C ls -ld "$LOG_DIR/") in ????????w*) warn "LOG_DIR=$LOG_DIR can be written by everybody: set a folder of your own" ;; esac
  command -v flock >/dev/null || die 1 "flock is not installed: it comes with util-linux and with busybox"
  # $$ is the script even in the shell of an action.
  # shellcheck disable=SC2016 # for the other shell
  me=$(exec sh -c 'echo "$PPID"')
  said=$(
    umask 077
    exec 2>&1
    # A failed exec ends the shell, so a subshell tries it first.
    (exec 9>>"$LOCK_FILE") && exec 9>>"$LOCK_FILE" && flock 9 || exit 1
    if read -r owner began script action <"$LOCK_FILE" && [ -n "$began" ] && [ "$owner" != "$me" ] && [ "$(born "$owner")" = "$began" ]; then
      [ -n "$action" ] || { action=$script; script=$owner; } # written by an older version
      born "$script" >/dev/null || script=$owner
      printf '%s %s %s\n' "$script" "$owner" "$action"
      exit 2
    fi
    printf '%s %s %s %s\n' "$me" "$(born "$me")" $$ "$1" >"$LOCK_FILE"
  ) || return
  trap release_lock EXIT
  trap 'exit 130' INT
  trap 'exit 131' QUIT
  trap 'exit 143' TERM HUP
}

release_lock() {
  trap - EXIT
  (: >"$LOCK_FILE") 2>/dev/null || :
}

# --- actions ----------------------------------------------------------------------------------------------------------

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# shellcheck source=rerank_kit/setup.sh
do_setup() { . "$KIT/rerank_kit/setup.sh" && do_setup; }

do_start() {
  need_vllm
  take_lock start
  refuse_other_host
  if pid=$(server_pid); then
    say "already running: PID $pid, $SERVICE_URL"
    kit serving.compare running || {
      code=$?
      [ "$code" != 1 ] || err "\"sh start_rerank.sh restart\" changes it"
      return "$code"
    }
    do_wait && return 0
    [ $? = 130 ] && return 130
    return 1
  fi
  if pid=$(lone_server); then
    die 1 "PID $pid serves without its supervisor, which was killed: run \"sh start_rerank.sh restart\""
  fi
  if [ -n "$(session_pids)" ]; then
    warn "killing processes that a dead server left: $(session_pids | tr '\n' ' ')"
    kill_session
  fi
  rm -f "$PID_FILE"
  # PID and start time of the supervisor, which writes its PID file itself.
  mine=$(kit serving.supervisor begin $$) || exit $?
  pid=${mine% *}
  release_lock
  say "starting: PID $pid, log $LOG_FILE"
  kit serving.health wait "$pid" "$LOG_FILE"
  case $? in
    0)
      if [ "$STARTUP_CHECK" = 1 ] && [ "$NODE_RANK" = 0 ]; then
        kit serving.check --quiet >&2
        case $? in
          0) ;;
          1)
            err "the service answers, but its scores cannot be right, so it is stopped (STARTUP_CHECK=0 starts it anyway)"
            end_mine
            return 1
            ;;
          *) warn "its scores could not be checked; \"sh start_rerank.sh check\" tries again" ;;
        esac
      fi
      [ "$NODE_RANK" != 0 ] || say "ready: $SERVICE_URL (model name $SERVED_MODEL_NAME)"
      ;;
    4) warn "not ready yet; \"sh start_rerank.sh status\" shows when it is, \"stop\" ends it"; return 1 ;;
    130) return 130 ;;
    *)
      is_mine || return 1 # a stop or restart came
      err "the last lines of $LOG_FILE:"
      grep -v '^\[kit\]' "$LOG_FILE" | tail -n 15 >&2
      end_mine
      return 1
      ;;
  esac
}

# Whether the PID file still names the service that this start began.
is_mine() { read_pid_file && [ "$pid $since" = "$mine" ]; }

# Ends what is left of it, unless a stop or a restart has taken over. The state file of another live supervisor stays.
end_mine() {
  try_lock start || return 0
  if is_mine; then
    kill_session
    rm -f "$PID_FILE"
    writer=$(sed -n 's/.*"pid": \([0-9]*\).*/\1/p' "$STATE_FILE" 2>/dev/null)
    if [ "$writer" = "${mine% *}" ] || ! born "$writer" >/dev/null; then rm -f "$STATE_FILE"; fi
  fi
  release_lock
}

# Waits up to $1 seconds until no process of our session is left.
session_ends() {
  waited=0
  while [ -n "$(session_pids)" ]; do
    [ "$waited" -lt $(($1 * 10)) ] || return 1
    nap
  done
}

kill_session() {
  # shellcheck disable=SC2046 # a list
  kill -KILL $(session_pids) 2>/dev/null
  session_ends 10 || die 1 "processes do not end: $(session_pids | tr '\n' ' ')"
}

do_stop() {
  take_lock stop
  refuse_other_host
  # If the supervisor is gone, the server itself gets the TERM.
  pid=$(server_pid) || pid=$(lone_server) || pid=
  if [ -z "$pid" ] && [ ! -f "$PID_FILE" ]; then say "not running"; return 0; fi
  if [ -n "$pid" ]; then
    say "stopping PID $pid: calls in flight get $((STOP_DELAY_S + STOP_TIMEOUT_S)) s"
    # TERM goes to the supervisor only, which passes it to the server only. The server drains and then ends its engine.
    # TERM to the group would lose every call in flight, and KILL on the server would orphan the GPU workers.
    if since=$(born "$pid"); then # it may have ended by itself just now
      kill -TERM "$pid"
      wait_for_end $((STOP_DELAY_S + STOP_TIMEOUT_S + 20)) "$pid" "$since" || [ -f "$PID_FILE" ] || die 1 "PID $pid does not end"
    fi
  fi
  session_ends 2 || { warn "killing remaining processes: $(session_pids | tr '\n' ' ')"; kill_session; }
  rm -f "$PID_FILE" "$STATE_FILE"
  say "stopped"
}

# No service is stopped for a next one that cannot start.
do_restart() {
  need_vllm
  kit serving.compare next || { code=$?; err "nothing was stopped"; return "$code"; }
  do_stop && do_start
}

do_wait() {
  pid=$(server_pid 2>/dev/null) || { kit serving.status; return; }
  kit serving.health wait "$pid" "$LOG_FILE"
  case $? in 0) return 0 ;; 4) return 150 ;; 130) return 130 ;; *) return 1 ;; esac
}

# For systemd: waits for the server that "run" became, by its PID. Its output goes to the journal, not to a log file.
do_wait_for() { kit serving.health wait "$1" /dev/null; }

do_status() { kit serving.status "$@"; }

do_healthy() { kit serving.health healthy; }

do_tail() {
  [ -f "$LOG_FILE" ] || die 1 "no log yet: $LOG_FILE"
  exec tail -n 50 -F "$LOG_FILE"
}

do_check() { kit serving.check "$@"; }

do_quality() { "$PY" "$KIT/bench_rerank.py" --quality "$@"; }

do_cfg() { kit serving.command cfg; }

# For systemd and containers: this process becomes the server and stays in the foreground.
do_run() {
  need_vllm
  become_kit serving.command exec
}

# The service of these settings, or the one that BASE_URL names.
do_example() {
  key=$("$PY" "$KIT/env_utils.py" get API_KEY) && [ "$key" != None ] || key=
  export RERANK_BASE_URL="${RERANK_BASE_URL:-${BASE_URL:-$SERVICE_URL}}" RERANK_API_KEY="${RERANK_API_KEY:-$key}"
  exec "$PY" "$KIT/main.py"
}

do_demo() {
  do_setup
  device=cpu
  has_gpu && device=gpu
  if ! server_pid >/dev/null; then
    MODEL_PATH=$(kit models.download demo "$device") || exit $?
    export MODEL_PATH
    say "demo: model $MODEL_PATH"
  fi
  do_start || exit $?
  say ""
  # The client leaves PORT and API_KEY of the environment to the program around it, and this one is the kit's own.
  key=$("$PY" "$KIT/env_utils.py" get API_KEY) && [ "$key" != None ] || key=
  RERANK_BASE_URL=$SERVICE_URL RERANK_API_KEY=$key "$PY" "$KIT/main.py" || exit $?
  say ""
  case ${MODEL_PATH:-} in
    */all-MiniLM-L6-v2)
      say "This was all-MiniLM-L6-v2, a small English embedding model (score = cosine similarity), served by the same vLLM"
      say "through the same routes. To serve Qwen3-Reranker, write MODEL_PATH=Qwen/Qwen3-Reranker-0.6B (a hub id or a folder)"
      say "into .env and run \"sh start_rerank.sh restart\"."
      ;;
  esac
  say "The service keeps running at $SERVICE_URL. Stop it with: sh start_rerank.sh stop"
}

# Runs an action beside this shell, which only waits: a shell runs no trap while a command runs, and pip, a download or a
# model that loads take minutes. So TERM and Ctrl-C end the action at once.
act() {
  child='' acting=$1
  trap 'interrupted 130' INT
  trap 'interrupted 131' QUIT
  trap 'interrupted 143' TERM HUP
  # Without this the action would read from /dev/null.
  if (: <&0) 2>/dev/null; then exec 3<&0; else exec 3</dev/null; fi
  "$@" <&3 3<&- &
  child=$!
  exec 3<&-
  wait "$child"
}

# The processes that an action started, without the service, in one line.
descendants() {
  read_pid_file || pid=
  family=" $1 " service=$pid
  table=$(
    for file in /proc/[0-9]*/stat; do
      read_stat "$file" || continue
      # shellcheck disable=SC2086 # split into fields on purpose
      set -- $fields
      file=${file#/proc/}
      printf '%s %s\n' "${file%/stat}" "${2-}"
    done
  )
  while :; do
    more=$(printf '%s\n' "$table" | while read -r id parent; do
      case $family in *" $id "*) continue ;; *" $parent "*) [ "$id" = "$service" ] || printf '%s ' "$id" ;; esac
    done)
    [ -n "$more" ] || break
    family="$family$more"
  done
  printf '%s\n' "$family"
}

# Sends TERM to a process and all its descendants, and lists them in all. They are frozen first, so that none starts
# another one meanwhile.
end_family() {
  all='' frozen=''
  while more=$(descendants "$1") && [ "$more" != "$all" ]; do
    all=$more frozen="$frozen $more"
    # shellcheck disable=SC2086 # a list
    kill -STOP $all 2>/dev/null
  done
  # A supervisor that has just written its PID file is no longer among them, and frozen.
  # shellcheck disable=SC2086 # a list
  { kill -TERM $all; kill -CONT $frozen; } 2>/dev/null
}

interrupted() {
  trap '' INT QUIT TERM HUP
  if [ -n "$child" ]; then
    end_family "$child"
    # shellcheck disable=SC2086 # a list
    wait_for_end 2 "$child" "$(born "$child")" || kill -KILL $all 2>/dev/null
  fi
  case $acting in
    do_start | do_restart | do_demo)
      if server_pid >/dev/null && ! grep -q '"state": "\(ready\|stopping\)"' "$STATE_FILE" 2>/dev/null; then
        warn "interrupted; the server continues to load, \"stop\" ends it"
      fi
      ;;
  esac
  exit "$1"
}

# Prints the comment at the top of this script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

main() {
  case "$#:$*" in
    1:wait-for | "2:wait-for " | 2:wait-for\ *[!0-9]*) usage >&2; exit 2 ;;
    *:bench | *:score | *:bench\ * | *:score\ * | *:quality\ *) ;;
    1:* | "2:check --reference" | "2:check --exact" | "2:status --json" | 2:wait-for\ *) ;;
    *) usage >&2; exit 2 ;;
  esac
  case $1 in help | -h | --help) usage; exit 0 ;; esac
  case $1 in example | bench | python) ;; *) [ "$(uname -s)" = Linux ] || die 5 "the service runs on Linux only, and this is $(uname -s). On Windows use WSL 2, on a Mac a Linux container or machine; the client (main.py) runs everywhere" ;; esac
  case $1 in
    setup | demo | start | stop | restart | wait | wait-for | status | healthy | check | quality | tail | cfg | run | python) ;;
    example | bench | score) ;;
    *) err "unknown action: $1"; usage >&2; exit 2 ;;
  esac
  find_python
  case $1 in
    python) need_vllm; say "$PY"; exit 0 ;;
    bench) need_packages requests aiohttp; shift; exec "$PY" "$KIT/bench_rerank.py" "$@" ;;
    score) need_vllm; shift; exec "$PY" "$KIT/vllm_usage.py" "$@" ;;
  esac
  load_config
  case $1 in
    example) need_packages requests; do_example ;;
    check | quality | status) action=$1; shift; act "do_$action" "$@" ;;
    wait-for) act do_wait_for "$2" ;;
    run | tail | healthy) "do_$1" ;; # the first two replace this shell
    *) act "do_$1" ;;
  esac
}

main "$@"
