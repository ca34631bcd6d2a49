#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the image; called by `./build.sh image`. Pushing it is left to you: docker push TAG.
set -Eeuo pipefail
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
root="$(dirname "$here")"
program="build.sh image"
. "$here/versions.env"
. "$here/checks.sh"

usage() {
  cat << 'EOT'
usage: ./build.sh image [--cpu | --cuda] [--base IMAGE] [--tag TAG] [--lmcache] [--omni] [--wheelhouse] [--print] [-- DOCKER-BUILD-OPTIONS]
  --cpu, --cuda   the platform; without, the one that this machine has
  --base IMAGE    the base image (default: see container/versions.env)
  --tag TAG       default tandem:VERSION-PLATFORM
  --lmcache       with LMCache (CUDA only)
  --omni          with vllm-omni's environment, for `serve --omni` (0.9 GB for CPUs)
  --wheelhouse    fetch all wheels with this host's pip and its settings first; the build then asks no package index
  --print         print the docker command instead of running it
DOCKER_HOST and docker's contexts say which engine builds. PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_TRUSTED_HOST of this environment are
passed on to the build stage, which is not a part of the image.
EOT
}

parse_arguments() {
  platform=auto base="" tag="" options="" wheelhouse="" print_only="" extra=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --cpu | --cuda) platform="${1#--}" ;;
      --lmcache | --omni) options="${options:+$options }$1" ;;
      --wheelhouse) wheelhouse=yes ;;
      --print) print_only=yes ;;
      --base | --tag)
        [ $# -gt 1 ] || die "$1 needs a value"
        printf -v "${1#--}" %s "$2"; shift ;;
      --) shift; extra=("$@"); break ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; die "unknown argument '$1'" ;;
    esac
    shift
  done
}

has_option() { case " $options " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

version() { sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$root/plugins/protocol/tandem_protocol/version.py"; }

revision() {
  local commit; commit="$(git -C "$root" rev-parse HEAD 2> /dev/null)" || { printf unknown; return; }
  git -C "$root" diff --quiet HEAD -- 2> /dev/null || commit+=-dirty
  printf %s "$commit"
}

# This host's pip must be of the Python that the image has: Debian 12 has 3.11, Ubuntu 24.04 has 3.12.
fill_wheelhouse() {
  local python="${TANDEM_PYTHON:-python3}" folder="$here/wheelhouse"
  "$python" -m pip --version > /dev/null 2>&1 || die "$python has no pip: set TANDEM_PYTHON to a Python with pip, of the image's version"
  "$python" -m pip wheel --no-input --disable-pip-version-check --progress-bar off --no-deps -w "$folder" -r "$root/requirements/$platform.txt" \
    "setuptools==$SETUPTOOLS_VERSION" || die "the wheels could not be fetched: see above"
  # CUDA's libraries come as torch's own requirements, which the lock leaves out.
  if [ "$platform" = cuda ]; then "$python" -m pip wheel --no-input --progress-bar off -w "$folder" "torch==$TORCH_VERSION" || die "torch could not be fetched: see above"; fi
  if has_option --lmcache; then "$python" -m pip wheel --no-input --progress-bar off --no-deps -w "$folder" -r "$here/lmcache.txt" || die "LMCache could not be fetched: see above"; fi
  if has_option --omni; then "$python" -m pip wheel --no-input --progress-bar off --no-deps -w "$folder" -r "$root/requirements/omni-$platform.txt" || die "vllm-omni could not be fetched: see above"; fi
}

_main() {
  parse_arguments "$@"
  platform="$(decide_platform "$platform")"
  if [ -z "$base" ]; then if [ "$platform" = cuda ]; then base="$TRITON_IMAGE"; else base="$DEBIAN_IMAGE"; fi; fi
  ! has_option --lmcache || [ "$platform" = cuda ] || die "LMCache copies KV blocks with CUDA alone: leave --lmcache out, or build with --cuda"
  tag="${tag:-tandem:$(version)-$platform}"
  local command=(docker build --file "$here/Dockerfile" --tag "$tag" --build-arg "BASE_IMAGE=$base" --build-arg "PLATFORM=$platform"
    --build-arg "INSTALL_OPTIONS=$options" --build-arg "VERSION=$(version)" --build-arg "REVISION=$(revision)"
    --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)")
  local name; for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST; do [ -z "${!name:-}" ] || command+=(--build-arg "$name"); done
  command+=("${extra[@]}" "$root")
  if [ -n "$print_only" ]; then printf '%q ' "${command[@]}"; printf '\n'; return; fi
  command -v docker > /dev/null || die "docker is not installed: install it (Debian: apt-get install docker.io), or --print the command for another builder"
  docker version > /dev/null 2>&1 || die "no Docker Engine answers: start it, or set DOCKER_HOST"
  if [ -n "$wheelhouse" ]; then fill_wheelhouse; fi
  "${command[@]}"
  note "built $tag from $base"
}

_main "$@"
