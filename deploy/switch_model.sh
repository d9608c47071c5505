#!/bin/sh
# Which version of the model answers behind nginx: rerank_a or rerank_b of nginx-upstream.conf (docs/fleet.md).
#   sh switch_model.sh show             the choice in force, and every replica with its state and version
#   sh switch_model.sh to a|b           send all calls to one version; also for rollback
#   sh switch_model.sh canary a|b N     N % (1-99) of the client addresses to it, the others to the other version
# Nothing is changed unless every replica of the chosen version is ready, all have one version id, and nginx accepts the
# files. Environment: NGINX_DIR (/etc/nginx) holds the files, NGINX (nginx) is the command, ANYWAY=1 accepts a single
# ready replica (for an emergency rollback). Exit codes: 0 done, 1 not done, 2 usage.
set -u

DIR=${NGINX_DIR:-/etc/nginx}
NGINX=${NGINX:-nginx}
FILE=$DIR/nginx-switch.conf

say() { printf '%s\n' "$*"; }
warn() { printf '[WARN] %s\n' "$*" >&2; }
die() { code=$1; shift; printf '[ERR] %s\n' "$*" >&2; exit "$code"; }
usage() { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# host:port of every server of one upstream block.
servers() {
  awk -v block="rerank_$1" '
    $1 == "upstream" { inside = ($2 == block) }
    inside && $1 == "server" { sub(/;.*/, "", $2); print $2 }' "$DIR/nginx-upstream.conf"
}

# "STATUS VERSION" of a replica by /ready, which needs no key; 000 - without an answer.
ask() {
  curl --silent --noproxy '*' --max-time 5 --dump-header - --output /dev/null "http://$1/ready" | tr -d '\r' | awk '
    NR == 1 { status = $2 }
    tolower($1) == "x-rerank-version:" { version = $2 }
    END { print (status ? status : "000"), (version ? version : "-") }'
}

# Fails unless the block has replicas and all of them are ready with one version.
require_ready() {
  found=$(servers "$1")
  [ -n "$found" ] || die 1 "upstream rerank_$1 in $DIR/nginx-upstream.conf has no servers"
  ready=0 versions=
  for server in $found; do
    answer=$(ask "$server")
    status=${answer%% *} version=${answer#* }
    if [ "$status" != 200 ]; then
      message="replica $server of rerank_$1 is not ready (/ready: $status)"
      [ "${ANYWAY:-0}" = 1 ] || die 1 "$message: nothing was changed"
      warn "$message"
      continue
    fi
    ready=$((ready + 1))
    case " $versions " in *" $version "*) ;; *) versions="$versions $version" ;; esac
  done
  # shellcheck disable=SC2086 # counted as words on purpose
  set -- "$1" $versions
  [ "$ready" -gt 0 ] || die 1 "no replica of rerank_$1 is ready: nothing was changed"
  [ $# -eq 2 ] || die 1 "the replicas of rerank_$1 have different versions ($versions ): nothing was changed"
  say "rerank_$1: $ready ready, version $2"
}

# The new file is in force, or the old one is back.
apply() {
  cp "$FILE" "$FILE.old" || die 1 "$FILE cannot be copied"
  {
    printf '%s\n' "# Which upstream answers; part of nginx.conf, written by switch_model.sh." "$1" >"$FILE.new" &&
      mv "$FILE.new" "$FILE"
  } || die 1 "$FILE cannot be written"
  # shellcheck disable=SC2086 # NGINX is a command with its arguments
  if $NGINX -t 2>"$FILE.err" && $NGINX -s reload 2>"$FILE.err"; then
    rm -f "$FILE.err"
    say "in force: $2"
  else
    mv "$FILE.old" "$FILE"
    cat "$FILE.err" >&2
    rm -f "$FILE.err"
    die 1 "nginx rejected the new files: the old choice stays in force"
  fi
}

# One change at a time: two would take each other's old choice for the one to go back to.
lock() {
  command -v flock >/dev/null 2>&1 || return 0
  (: >>"$FILE.lock") 2>/dev/null || die 1 "$FILE.lock cannot be written: run it as root"
  exec 9>>"$FILE.lock"
  flock -n 9 || die 1 "another switch_model.sh is under way: nothing was changed"
}

other() { case $1 in a) say b ;; *) say a ;; esac; }

main() {
  case ${1:-} in
    show) [ $# -eq 1 ] || usage ;;
    to) [ $# -eq 2 ] || usage ;;
    canary) [ $# -eq 3 ] || usage ;;
    *) usage ;;
  esac
  if [ "$1" != show ]; then case $2 in a | b) ;; *) usage ;; esac; fi
  if [ "$1" = canary ]; then case $3 in [1-9] | [1-9][0-9]) ;; *) usage ;; esac; fi
  command -v curl >/dev/null 2>&1 || die 1 "curl is needed: apt install curl"
  for file in "$DIR/nginx-upstream.conf" "$FILE"; do [ -r "$file" ] || die 1 "$file cannot be read (NGINX_DIR)"; done
  case $1 in
    show)
      grep -v '^#' "$FILE"
      for pool in a b; do
        for server in $(servers "$pool"); do say "rerank_$pool $server $(ask "$server")"; done
      done
      ;;
    to)
      lock
      require_ready "$2"
      apply "map \"\" \$rerank_pool { default rerank_$2; }" "all calls to rerank_$2"
      ;;
    canary)
      lock
      require_ready "$2"
      require_ready "$(other "$2")"
      apply "split_clients \$remote_addr \$rerank_pool { $3% rerank_$2; * rerank_$(other "$2"); }" \
        "$3 % of the client addresses to rerank_$2, the others to rerank_$(other "$2")"
      ;;
  esac
}

main "$@"
