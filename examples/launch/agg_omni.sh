#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Omni: a pipeline of vllm-omni (text, images, sound) as the model `omni`, in an environment of its own, which is made the first time.
# usage: agg_omni.sh PIPELINE [SERVE OPTIONS]   (a folder or hub id that vllm-omni knows, e.g. Qwen/Qwen-Image; --deploy-config FILE)
# Needs: a GPU; vllm-omni has no platform for CPUs.
set -Eeuo pipefail
pipeline="${1:?usage: agg_omni.sh PIPELINE [SERVE OPTIONS]}"; shift
[ ! -d "$pipeline" ] || pipeline="$(readlink -f "$pipeline")"
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --omni --model "$pipeline" "$@"

# Text goes to the terminal, a picture or a sound into a file.
output="$(mktemp -d)/answer"
./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model omni --output "$output" "Paint a cat on a roof." ||
  echo "The pipeline made neither a picture nor a sound." >&2
echo "Still serving; ./build.sh stop ends it." >&2
