#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Approximate routing: the router hears no KV events, and believes for two minutes that each engine still has what it was sent.
# For engines that publish no events. The engines' own events are switched off here.
# Needs: two GPUs, or a CPU with about 10 GiB of memory.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode agg --workers 2 --routers 1 --router-mode kv --no-kv-events --router-ttl 120 \
  --kv-events-config '{"enable_kv_cache_events": false}' "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model router "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
