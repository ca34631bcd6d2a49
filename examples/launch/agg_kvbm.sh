#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# KV tiers: blocks that the device gives up stay in host memory (here 1 GB; on a GPU host give what you have) and come back faster than
# they are computed. A folder for a disk tier: --disk-cache-gb 100 --disk-cache-dir /nvme/kv
# Needs: one GPU, or a CPU with about 6 GiB of memory; the tier is in /dev/shm.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode agg --routers 0 --connector kvbm --cpu-cache-gb "${CPU_CACHE_GB:-1}" "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model vllm "What is the capital of France?"
# Size, use and hit rate of each tier, from the worker's admin port.
curl -sS "localhost:${DYN_SYSTEM_PORT:-8081}/kvbm"; echo
echo "Still serving; ./build.sh stop ends it." >&2
