#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The host's side of a checkpoint (docs/checkpoint.md): dumps a held worker, or restores it. NOT RUN by Tandem's tests: they need no
# CRIU. Needs root, CRIU 4 with its CUDA plugin, cuda-checkpoint, one GPU, and the variables that the worker has.
# usage: agent.sh dump PID_OF_TRITONSERVER | agent.sh restore
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

_settings() {
  : "${DYN_CHECKPOINT_SIGNAL_FILE:?}" "${DYN_READY_FOR_CHECKPOINT_FILE:?}" "${DYN_CHECKPOINT_LOCATION:?}" "${DYN_RESTORE_MARKER_FILE:?}"
  images="$DYN_CHECKPOINT_LOCATION/images"
  options=(--lib "${CRIU_CUDA_PLUGIN_DIR:?set it to the folder of cuda_plugin.so}" --images-dir "$images"
    --shell-job --ext-unix-sk --tcp-established --link-remap --file-locks)
  wait_s="${TANDEM_CHECKPOINT_TIMEOUT_S:-600}"
}

# By rename, so that nobody reads half of it.
_say() { printf '%s\n' "$2" > "$1.partial" && mv "$1.partial" "$1"; }

_fail() {
  _say "$DYN_CHECKPOINT_SIGNAL_FILE" "{\"success\": false, \"error\": \"$1, see $images/dump.log\"}"
  exit 1
}

_dump() {
  local waited=0
  _settings
  until [ -e "$DYN_READY_FOR_CHECKPOINT_FILE" ]; do
    [ "$waited" -lt "${wait_s%.*}" ] || { echo "agent.sh: the worker was not ready within $wait_s s" >&2; exit 1; }
    sleep 1
    waited=$((waited + 1))
  done
  mkdir -p "$images"
  criu dump --tree "$1" --leave-running --log-file dump.log "${options[@]}" || _fail "criu dump failed"
  _say "$DYN_CHECKPOINT_LOCATION/checkpoint.done" '{"success": true}'
  _say "$DYN_CHECKPOINT_SIGNAL_FILE" '{"success": true}'
}

_restore() {
  _settings
  if ! grep -q '"success": true' "$DYN_CHECKPOINT_LOCATION/checkpoint.done"; then
    echo "agent.sh: no checkpoint in $DYN_CHECKPOINT_LOCATION" >&2
    exit 1
  fi
  touch "$DYN_RESTORE_MARKER_FILE"
  criu restore --restore-detached --log-file restore.log "${options[@]}"
}

_main() {
  case "${1:-}" in
    dump) _dump "${2:?give the process id of tritonserver}" ;;
    restore) _restore ;;
    *) sed -n '3,5p' agent.sh; exit 2 ;;
  esac
}

_main "$@"
