#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Decisions about the machine: which platform, and whether its Python and driver can run what versions.env pins. Sourced by
# install_vllm.sh and entrypoint.sh; each check prints nothing when all is well, and else dies with a sentence that says the fix.

die() { printf '%s: %s\n' "${program:-tandem}" "$1" >&2; exit 2; }
note() { printf '%s: %s\n' "${program:-tandem}" "$1" >&2; }

# at_least HAVE WANT: whether a version is not older than another.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | sed -n 1p)" = "$2" ]; }

# No pipe here or below ends before its writer has: under pipefail a writer that hits a closed pipe (SIGPIPE, 141) fails the check.
gpu_visible() { command -v nvidia-smi > /dev/null && [ -n "$(nvidia-smi -L 2> /dev/null | sed -n '/^GPU /p')" ]; }

# The platform that was asked for (cpu, cuda), or the one that this machine has.
decide_platform() {
  case "${1:-auto}" in
    cpu | cuda) printf '%s' "$1" ;;
    auto) if gpu_visible; then printf cuda; else printf cpu; fi ;;
    *) die "unknown platform '$1': give --cpu or --cuda" ;;
  esac
}

check_machine() {
  local machine; machine="$(uname -m)"
  [ "$machine" = x86_64 ] || die "this machine is $machine, and the pinned wheels of tritonserver are for x86_64: build on x86_64"
}

# check_python PYTHON: its version is one that stubs and wheels exist for, and it can make environments.
check_python() {
  local version
  version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)" || die "$1 does not run: install python3 (Debian: apt-get install python3 python3-venv)"
  case " $PYTHON_VERSIONS " in
    *" $version "*) ;;
    *) die "$1 is Python $version, and tritonserver's stubs are for ${PYTHON_VERSIONS// / and }: take a base image with one of them (Debian 12, Ubuntu 24.04)" ;;
  esac
  "$1" -c 'import ensurepip, venv' 2> /dev/null || die "$1 can't make environments: install python3-venv (Debian: apt-get install python$version-venv)"
}

# check_driver: the driver speaks the CUDA of torch's wheels. Without any driver it says so and goes on: images are built where there is none.
check_driver() {
  local header cuda driver capability
  command -v nvidia-smi > /dev/null || { note "no NVIDIA driver is visible here, as usual while an image is built; it is checked again when a worker starts"; return 0; }
  header="$(nvidia-smi 2>&1)" || die "nvidia-smi fails (${header%%$'\n'*}): reload or reinstall the NVIDIA driver, $CUDA_DRIVER_VERSION or newer"
  cuda="$(sed -n 's/.*CUDA\( UMD\)\{0,1\} Version: *\([0-9][0-9.]*\).*/\2/p' <<< "$header" | sed -n 1p)"
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | sed -n 1p)"
  [ -n "$driver" ] || die "nvidia-smi lists no GPU: give the container GPUs (docker run --gpus all), or install with --cpu"
  at_least "${cuda:-0}" "$CUDA_VERSION" || die "driver $driver speaks CUDA ${cuda:-(unknown)}, and the wheels need $CUDA_VERSION: install driver $CUDA_DRIVER_VERSION or newer, or install with --cpu"
  while read -r capability; do
    at_least "$capability" "$CUDA_CAPABILITY" || die "a GPU of compute capability $capability is too old for CUDA $CUDA_VERSION, which begins at $CUDA_CAPABILITY: hide it (CUDA_VISIBLE_DEVICES), or use another"
  done < <(nvidia-smi --query-gpu=compute_cap --format=csv,noheader)
}

# check_toolkit: a CUDA compiler of another major version breaks kernels that are compiled at run time; none at all is fine.
check_toolkit() {
  local release
  command -v nvcc > /dev/null || return 0
  release="$(nvcc --version | sed -n 's/.*release \([0-9][0-9.]*\),.*/\1/p')"
  [ "${release%%.*}" = "${CUDA_VERSION%%.*}" ] || note "nvcc is of CUDA ${release:-(unknown)} and the wheels of $CUDA_VERSION: kernels that are compiled at run time (FlashInfer, DeepGEMM) may fail; install cuda-toolkit-${CUDA_VERSION/./-} or remove nvcc from PATH"
}

# check_space FOLDER GIB: room for the environment.
check_space() {
  local free
  free="$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }')"
  [ "$free" -ge "$2" ] || die "$1 has $free GiB free and the environment needs about $2: free some, or choose another --prefix"
}
