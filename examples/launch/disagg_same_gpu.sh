#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Disaggregated on one GPU: prefill and decode side by side. For trying it out; the two take turns on the GPU, so it is faster than one
# engine only for mixed loads (benchmarks/README.md).
# Needs: one GPU. On a CPU, disagg.sh does the same.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# The launcher gives each of two engines half of vLLM's share of memory when they meet on a GPU. Blocks of 64 tokens give NIXL fewer and
# larger reads.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
./build.sh serve --detach --mode disagg --routers 0 --block-size 64 "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model disagg "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
