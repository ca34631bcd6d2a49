#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Writes what an image is made of: every Python package with its wheel's metadata, and every Debian package with version and source.
# usage: sbom.sh ENVIRONMENT FOLDER
set -Eeuo pipefail
environment="${1:?usage: sbom.sh ENVIRONMENT FOLDER}"; folder="${2:?usage: sbom.sh ENVIRONMENT FOLDER}"
# shellcheck disable=SC2016
# (dpkg-query expands these, not the shell.)
columns='${binary:Package}\t${Version}\t${Architecture}\t${source:Package}\n'
mkdir -p "$folder"
"$environment/bin/python" -m pip inspect --local --disable-pip-version-check > "$folder/python.json" 2> /dev/null
"$environment/bin/python" -m pip list --format freeze --disable-pip-version-check > "$folder/python.txt"
# vllm-omni's environment, where there is one: what it has besides the other's packages.
if [ -e "$environment/.omni" ]; then
  packages="$(find "$(cat "$environment/.omni")/lib" -type d -path '*/python3.*/site-packages' -prune)"
  "$environment/bin/python" -m pip inspect --path "$packages" --disable-pip-version-check > "$folder/python-omni.json" 2> /dev/null
  "$environment/bin/python" -m pip list --path "$packages" --format freeze --disable-pip-version-check > "$folder/python-omni.txt"
fi
if command -v dpkg-query > /dev/null; then dpkg-query -W -f "$columns" > "$folder/debian.tsv"; fi
