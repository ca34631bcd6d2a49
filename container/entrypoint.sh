#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The image's entry: a role, then its flags. Checks what a role needs of its environment, and ends in exec, so that signals reach it.
#   worker        one engine: tandem serve without a router (--mode agg, unless a mode or a single role is given)
#   router        the model `router` alone, over the workers in TANDEM_DISCOVERY
#   planner       python -m tandem_planner
#   consolidator  python -m tandem_kvbm.consolidator
# Anything else is run as it is: docker run IMAGE tandem doctor
set -Eeuo pipefail
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
program=tandem
. "$here/versions.env"
. "$here/checks.sh"

# flag NAME ARGUMENTS...: whether --NAME or --NAME=value is among the arguments.
flag() {
  local name="--$1" argument; shift
  for argument in "$@"; do case "$argument" in "$name" | "$name"=*) return 0 ;; esac; done
  return 1
}

is_true() { case "${1,,}" in 1 | true | yes | on) return 0 ;; *) return 1 ;; esac; }

check_home() {
  local home="${TANDEM_HOME:-/var/lib/tandem}"
  { mkdir -p "$home" && [ -w "$home" ]; } 2> /dev/null || die "$home can't be written by user $(id -u): mount a volume that this user owns (--user, or fsGroup 10001)"
}

# A model folder that is not mounted is the most usual mistake; hub ids are left to the launcher.
check_model() {
  local model="${TANDEM_MODEL:-}"
  case "$model" in
    /*)
      [ -e "$model/config.json" ] || [ -e "$model/model_index.json" ] || die "TANDEM_MODEL=$model is no model folder in this container: mount it (-v /host/models:/models:ro), or give a hub id like org/name"
      local unreadable; unreadable="$(find -L "$model" -maxdepth 1 -type f ! -readable | sed -n 1p)"
      [ -z "$unreadable" ] || die "$unreadable can't be read by user $(id -u): on the host, chmod a+r the files of the model" ;;
  esac
}

# Workers and routers on several hosts meet in etcd or in Kubernetes' API: each worker must say where it is reached.
check_fleet_address() {
  local discovery="${TANDEM_DISCOVERY:-}"
  flag discovery "$@" && return 0
  case "$discovery" in
    "" | file:*) ;;
    etcd://* | kubernetes | kubernetes:*)
      if [ -z "${TANDEM_GRPC_URL:-}" ] && ! flag grpc-url "$@"; then
        die "with TANDEM_DISCOVERY=$discovery routers on other hosts need this worker's address: set TANDEM_GRPC_URL=HOST:8001 (in Kubernetes: \$(POD_IP):8001)"
      fi ;;
    *) die "TANDEM_DISCOVERY=$discovery is no discovery: use file:/shared/folder, etcd://host:2379 or kubernetes" ;;
  esac
}

check_gpu_platform() {
  if [ "$(cat "$here/../venv/.tandem/platform" 2> /dev/null)" = cuda ] && [ "${TANDEM_PLATFORM:-}" != cpu ]; then
    command -v nvidia-smi > /dev/null || die "this image is for CUDA and the container has no GPU: docker run --gpus all (nvidia-container-toolkit on the host), or in Kubernetes a limit of nvidia.com/gpu"
    check_driver
  fi
}

worker() {
  local mode=()
  check_home; check_model; check_fleet_address "$@"; check_gpu_platform
  if flag omni "$@"; then exec tandem serve "$@"; fi  # a pipeline has no mode and no routers
  if ! flag mode "$@" && ! flag is-prefill-worker "$@" && ! flag is-decode-worker "$@" \
    && ! is_true "${DYN_VLLM_IS_PREFILL_WORKER:-}" && ! is_true "${DYN_VLLM_IS_DECODE_WORKER:-}"; then mode=(--mode agg); fi
  flag routers "$@" || mode+=(--routers 0)
  exec tandem serve "${mode[@]}" "$@"
}

router() {
  check_home; check_model
  [ -n "${TANDEM_DISCOVERY:-}" ] || flag discovery "$@" || die "a router alone needs to find its workers: set TANDEM_DISCOVERY to theirs (file:/shared/folder, etcd://host:2379)"
  check_fleet_address --grpc-url "$@"
  exec tandem serve --mode agg --workers 0 "$@"
}

planner() {
  check_home
  python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("tandem_planner.__main__") is None)' || die "this build has no planner yet"
  exec python -m tandem_planner "$@"
}

consolidator() {
  [ $# -eq 0 ] || die "a consolidator takes its settings from the environment (TANDEM_CONSOLIDATOR_*), not from '$1'"
  exec python -m tandem_kvbm.consolidator
}

_main() {
  local role="${1:-worker}"
  [ $# -eq 0 ] || shift
  export TANDEM_CONTAINER_ROLE="$role"
  case "$role" in
    worker | router | planner | consolidator) mkdir -p "${TANDEM_HOME:-/var/lib/tandem}" 2> /dev/null || true; "$role" "$@" ;;
    -*) die "the first argument is the role (worker, router, planner, consolidator), not '$role'" ;;
    *) exec "$role" "$@" ;;
  esac
}

_main "$@"
