#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two routers, each in a server of its own, in front of the same two engines: either may die. They share their books, so both know what
# the other one has placed.
# Needs: two GPUs, or a CPU with about 11 GiB of memory.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# Workers and routers find each other in this folder; over several hosts it would be etcd://HOST:2379.
TANDEM_DISCOVERY="file:$(mktemp -d)"
export TANDEM_DISCOVERY
first="${TANDEM_ROUTER_PORT:-8100}"

./build.sh serve --detach --mode agg --workers 2 --routers 0 "$@"
for port in "$first" "$((first + 10))"; do
  ./build.sh serve --detach --mode agg --workers 0 --routers 1 --router-replica-sync \
    --http-port "$port" --grpc-port "$((port + 1))" --metrics-port "$((port + 2))" --router-admin-port "$((port + 3))"
done

for port in "$first" "$((first + 10))"; do
  ./build.sh tandem generate --url "localhost:$((port + 1))" --model router "What is the capital of France?"
done
echo "Still serving; ./build.sh stop ends all three servers." >&2
