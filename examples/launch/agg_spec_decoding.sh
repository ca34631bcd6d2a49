#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Speculative decoding: vLLM guesses the next tokens from n-grams of the prompt and checks several in one step. The text stays the same;
# answers that repeat their prompt (summaries, code edits) come faster. Another draft model: change the JSON (vLLM's speculative_config).
# Needs: one GPU, or a CPU with about 5 GiB of memory.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode agg --routers 0 \
  --speculative-config '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}' "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model vllm "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
