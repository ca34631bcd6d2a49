#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# LMCache instead of our KV tiers. Its settings are its own (LMCACHE_*).
# Needs: one GPU and the package lmcache (container/install_vllm.sh --lmcache; docs/limits.md). On a CPU `serve` refuses it.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

export LMCACHE_CHUNK_SIZE="${LMCACHE_CHUNK_SIZE:-256}" LMCACHE_LOCAL_CPU="${LMCACHE_LOCAL_CPU:-True}"
export LMCACHE_MAX_LOCAL_CPU_SIZE="${LMCACHE_MAX_LOCAL_CPU_SIZE:-20}" # GB
./build.sh serve --detach --mode agg --routers 0 --connector lmcache "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model vllm "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
