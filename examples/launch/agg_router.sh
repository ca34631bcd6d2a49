#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# KV-aware routing: two engines, and the model `router` that sends each request to the one that has most of its prompt in its cache
# and least to do.
# Needs: two GPUs, or a CPU with about 10 GiB of memory.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# The models `vllm`, `vllm_1` and `router`. The engines publish what they cache (KV events), and the router keeps an index of it.
./build.sh serve --detach --mode agg --workers 2 --routers 1 --router-mode kv "$@"

url="${TANDEM_URL:-localhost:8001}"
./build.sh tandem generate --url "$url" --model router "What is the capital of France?"
# Where the router would send a prompt, and why: the cost of each engine, term by term.
./build.sh tandem route --url "$url" "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
