#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# How vllm-omni's environment is made (docs/omni.md, "Its environment"); sourced by the checkout's build.sh and by install_vllm.sh, which have `die`.

# make_omni_environment COMMON OMNI LOCK [PIP-OPTIONS...]: what differs from the common environment; a .pth adds the common one's packages after
# its own, and with them Tandem. The common one remembers it: `tandem serve` and `tandem doctor` look there.
make_omni_environment() {
  local common="$1" omni="$2" lock="$3" own shared; shift 3
  rm -rf "$omni"
  "$common/bin/python" -m venv "$omni" --without-pip || die "the environment $omni could not be made: see above"
  "$common/bin/python" -m pip --python "$omni/bin/python" install --no-input --disable-pip-version-check --no-deps "$@" -r "$lock" ||
    die "vllm-omni's environment could not be installed: see above; try again when the package index is reachable"
  own="$(find "$omni/lib" -type d -path '*/python3.*/site-packages' -prune)" shared="$(find "$common/lib" -type d -path '*/python3.*/site-packages' -prune)"
  if [ ! -d "$own" ] || [ ! -d "$shared" ]; then die "$omni or $common has no folder of packages: remove both and run again"; fi
  printf 'import site; site.addsitedir("%s")\n' "$shared" > "$own/tandem.pth"
  # An index may have torchvision's build for CUDA alone, whose operators don't load beside a torch for CPUs.
  case "$lock" in *-cpu.txt) echo 'import tandem_worker.omni.torchvision_import as torchvision_import; torchvision_import.install()' >> "$own/tandem.pth" ;; esac
  "$omni/bin/python" -c 'import torch, torchvision, transformers, tandem_worker.omni' || die "what was installed in $omni does not import: see above"
  printf '%s' "$omni" > "$common/.omni"
}
