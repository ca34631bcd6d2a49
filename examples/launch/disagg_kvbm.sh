#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Disaggregated with KV tiers where they pay: on the prefill worker, which computes prompts. Decode only pulls blocks over NIXL.
# Needs: two GPUs, or a CPU with about 11 GiB of memory; the tier is in /dev/shm.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# `kvbm nixl`: blocks are looked up in the tiers first, and handed over by NIXL.
./build.sh serve --detach --mode disagg --routers 0 --prefill-connector kvbm nixl --cpu-cache-gb "${CPU_CACHE_GB:-1}" "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model disagg "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
