#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Images, E/P/D: encode, prefill and decode in an engine each, chained by the router. They are asked what an image shows.
# usage: disagg_multimodal_epd.sh IMAGE_FILE [SERVE OPTIONS]
# Another model: MODEL, and PLACEHOLDER for what stands for an image in its prompts (docs/multimodal.md).
# Needs: three GPUs (fewer are shared), torchvision for the default model; or a CPU and a model that does without.
set -Eeuo pipefail
image="$(readlink -f "${1:?usage: disagg_multimodal_epd.sh IMAGE_FILE [SERVE OPTIONS]}")"; shift
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode disagg --routers 1 --encode 1 --model "${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct}" "$@"

# From a pipe, since a photograph is too long for a command line. `image` may be a URL as well.
prompt="<|im_start|>user\n${PLACEHOLDER:-<|vision_start|><|image_pad|><|vision_end|>}What is shown?<|im_end|>\n<|im_start|>assistant\n"
{ printf '{"temperature": 0, "max_tokens": 32, "text_input": "%s", "image": "' "$prompt"; base64 -w 0 "$image"; printf '"}'; } \
  | curl -sS --fail-with-body "${TANDEM_HTTP:-localhost:8000}/v2/models/router/generate" -d @-; echo
echo "Still serving; ./build.sh stop ends it." >&2
