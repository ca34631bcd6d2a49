#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tandem's front door: makes the environment once (pinned lock, kept outside the checkout), then runs what is asked for.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
root="$PWD"
home="${TANDEM_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/tandem}"

usage() {
  cat <<'EOF'
usage: ./build.sh COMMAND [ARGUMENTS]
  serve [OPTIONS]   start Triton with vLLM workers and follow its log (--detach returns when ready, --help tells the rest)
  stop              stop everything that serve started
  test [--full]     run the tests; --full adds the long suites; --faults [--report FILE] runs the fault-tolerance suite alone
  check             ruff, mypy, import contracts
  bench NAME        run a benchmark: serving [--json]
  image [OPTIONS]   build the container image (--help tells the options)
  chart             check the Helm chart and package it into dist/
  omni-env          make vllm-omni's environment and print its folder; serve --omni makes it, too (docs/omni.md)
  tandem ...        the tandem command: generate, chat, status, ...
EOF
}

die() { printf 'build.sh: %s\n' "$1" >&2; exit 2; }

. container/omni.sh

find_python() {
  local candidate
  for candidate in ${TANDEM_PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      command -v "$candidate"; return
    fi
  done
  die "Python 3.11 or 3.12 is needed and not found: install one (Debian: apt-get install python3 python3-venv), or set TANDEM_PYTHON to it"
}

has_gpu() { [ "${TANDEM_PLATFORM:-}" != cpu ] && command -v nvidia-smi >/dev/null && [ -n "$(nvidia-smi -L 2>/dev/null | sed -n '/^GPU /p')" ]; }

# Sets `env` to an environment that is complete; its name carries the hash of the lock, so a changed lock makes a new one.
ensure_environment() {
  local python platform=cpu key
  python="$(find_python)" || exit 2
  if has_gpu; then platform=cuda; fi
  key="$(cat "requirements/$platform.txt" requirements/dev.txt | sha256sum | cut -c1-12)"
  env="${TANDEM_ENV:-$home/envs/$platform-$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')-$key}"
  [ -e "$env/.complete" ] || create_environment "$python" "$platform"
  checkout="$root $(sha256sum < pyproject.toml | cut -c1-12)"
  [ "$(cat "$env/.checkout" 2>/dev/null)" = "$checkout" ] || link_checkout
}

create_environment() {
  printf 'making the environment %s (once, 2 to 5 minutes)\n' "$env" >&2
  rm -rf "$env"
  "$1" -m venv "$env" || die "python3-venv is missing: install it (Debian: apt-get install python3-venv)"
  local install=("$env/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar on)
  # The CUDA build of torch brings the CUDA libraries as its own requirements; all else is the lock, whole.
  if [ "$2" = cuda ]; then "${install[@]}" $(grep -E '^torch(vision)?==' requirements/cuda.txt) || die "torch could not be installed: see above"; fi
  "${install[@]}" --no-deps -r "requirements/$2.txt" -r requirements/dev.txt || die "the environment could not be installed: see above; try again when the package index is reachable"
  "$env/bin/python" -c 'import torch' 2>/dev/null || die "torch does not import: on a machine without CUDA, point pip at PyTorch's CPU index (PIP_EXTRA_INDEX_URL) and run again"
  touch "$env/.complete"
}

# The environment serves every checkout with this lock; the one that ran last is the one installed in it.
link_checkout() {
  "$env/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-build-isolation -e . >&2 || die "the checkout could not be installed: see above"
  printf '%s' "$checkout" > "$env/.checkout"
}

# vllm-omni's environment lies beside the common one and is named after it, so that another Python or lock makes another. One of your own
# (TANDEM_OMNI_ENV) is used as it is.
ensure_omni_environment() {
  local lock=requirements/omni-cpu.txt
  if has_gpu; then lock=requirements/omni-cuda.txt; fi
  if [ -z "${TANDEM_OMNI_ENV:-}" ]; then
    TANDEM_OMNI_ENV="$env-omni-$(sha256sum < "$lock" | cut -c1-12)"
    if [ ! -e "$TANDEM_OMNI_ENV/.complete" ]; then
      printf "making vllm-omni's environment %s (once, 2 to 5 minutes)\n" "$TANDEM_OMNI_ENV" >&2
      make_omni_environment "$env" "$TANDEM_OMNI_ENV" "$lock" --progress-bar on >&2
      touch "$TANDEM_OMNI_ENV/.complete"
    fi
    printf '%s' "$TANDEM_OMNI_ENV" > "$env/.omni"  # an older one may have been made since
  fi
  export TANDEM_OMNI_ENV
}

# Whether these arguments of `serve` want an environment that isn't named.
wants_omni_environment() {
  case " $* " in *" --omni-env"[=\ ]* | *" --help "* | *" -h "*) return 1 ;; *" --omni "*) return 0 ;; *) return 1 ;; esac
}

check() {
  "$env/bin/ruff" check . && "$env/bin/mypy" && PYTHONPATH="$root" "$env/bin/lint-imports"
}

# Baselines and plots that only benchmarks need, once per environment.
ensure_benchmarks() {
  local key; key="$(sha256sum < requirements/bench.txt | cut -c1-12)"
  [ -e "$env/.bench-$key" ] && return
  "$env/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps -r requirements/bench.txt >&2 || die "the benchmarks' packages could not be installed: see above"
  touch "$env/.bench-$key"
}

test_all() {
  local select=(-m "not slow and not gpu")
  if [ "${1:-}" = --full ]; then shift; select=(-m "not gpu"); export TANDEM_TEST_FREED_WITHIN_S="${TANDEM_TEST_FREED_WITHIN_S:-1}"; fi
  if [ "${1:-}" = --faults ]; then shift; select=(-m "not gpu" tests/fault_tolerance); fi
  "$env/bin/python" -m pytest --durations=25 --durations-min=5 "${select[@]}" "$@"
}

# helm comes with the environment. Every mode is linted, since a template is only looked at where its values lead.
chart() {
  local mode
  for mode in helm/tandem/modes/*.yaml; do "$env/bin/helm" lint --strict --quiet helm/tandem -f "$mode" || die "the chart is not clean: see above"; done
  "$env/bin/helm" package helm/tandem --destination dist
}

_main() {
  local command="${1:-}" env checkout
  [ -n "$command" ] || { usage; exit 2; }
  shift
  case "$command" in
    -h | --help | help) usage; return ;;
    image) exec container/build.sh "$@" ;;
    serve | stop | test | check | bench | chart | omni-env | tandem) ensure_environment ;;
    *) usage >&2; die "unknown command '$command'" ;;
  esac
  if [ "$command" = omni-env ] || { [ "$command" = serve ] && wants_omni_environment "$@"; }; then ensure_omni_environment; fi
  case "$command" in
    omni-env) printf '%s\n' "$TANDEM_OMNI_ENV" ;;
    serve | stop) exec "$env/bin/tandem" "$command" "$@" ;;
    tandem) exec "$env/bin/tandem" "$@" ;;
    test) check && test_all "$@" ;;
    check) check ;;
    chart) chart ;;
    bench) [ $# -gt 0 ] || die "which benchmark? one of: $(cd benchmarks && grep -l '^if __name__' ./*.py | sed 's#./##; s#\.py##; s#_#-#g' | tr '\n' ' ')"
           ensure_benchmarks; local name="$1"; shift; exec "$env/bin/python" -m "benchmarks.${name//-/_}" "$@" ;;
  esac
}

_main "$@"
