#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# LoRA: an adapter is loaded into the running engine, and a request names it.
# usage: agg_lora.sh ADAPTER_FOLDER [SERVE OPTIONS]   (safetensors, rank 64 at most, trained for the model that is served)
# Adapters may also come from s3:// and hf:// (docs/configuration.md).
# Needs: one GPU, or a CPU with about 5 GiB of memory.
set -Eeuo pipefail
adapter="$(readlink -f "${1:?usage: agg_lora.sh ADAPTER_FOLDER [SERVE OPTIONS]}")"; shift
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# --lora-roots: the only folders that file:// may name, since whoever reaches the admin port names one.
./build.sh serve --detach --mode agg --routers 0 --lora-enabled --max-lora-rank 64 --lora-roots "$adapter" "$@"

./build.sh tandem lora load mine "file://$adapter" --url "${TANDEM_URL:-localhost:8001}" --admin-port "${DYN_SYSTEM_PORT:-8081}"
curl -sS "${TANDEM_HTTP:-localhost:8000}/v2/models/vllm/generate" \
  -d '{"text_input": "What is the capital of France?", "lora_name": "mine", "temperature": 0, "max_tokens": 16}'; echo
echo "Still serving; ./build.sh stop ends it." >&2
