#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Speculative decoding with Eagle3: a head on Llama-3.1-8B's hidden states guesses two tokens, and the model checks them in its next step.
# The text stays the same. Other models need heads of their own: `model` in the JSON (docs/speculation.md).
# Needs: one GPU with 40 GB, access to meta-llama/Llama-3.1-8B-Instruct on the hub (HF_TOKEN) or both checkpoints in its cache.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode agg --routers 0 \
  --model meta-llama/Llama-3.1-8B-Instruct --max-model-len 8192 --gpu-memory-utilization 0.8 \
  --speculative-config '{"method": "eagle3", "model": "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", "num_speculative_tokens": 2, "draft_tensor_parallel_size": 1}' "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model vllm "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
