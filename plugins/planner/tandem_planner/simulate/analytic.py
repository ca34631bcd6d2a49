# SPDX-License-Identifier: Apache-2.0
"""AN ANALYTIC PROFILE, NOT A MEASURED ONE: what an engine could do at best by a roofline of its GPU, for places without a GPU.

    prefill = launch + FLOPs(prompt) / compute         FLOPs: 2 per weight and token, and attention over the tokens before
    decode  = launch + max(bytes(weights) / bandwidth, 2 FLOPs per weight and sequence / compute) + bytes(KV read) / bandwidth

Good for comparing planners with each other over one and the same profile; not for saying what a GPU does.
"""

from dataclasses import dataclass

import numpy as np

from tandem_planner.profile_data import DecodePoints, PrefillPoints, Profile

ISLS = (16, 64, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536, 131072)
KV_USES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CONTEXTS = (128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Roofline:
    """Assumptions. The defaults: Llama-3.1-8B's shape in bfloat16 on one H200, by NVIDIA's data sheet (989 TFLOPS dense, 4.8 TB/s)."""

    name: str = "8B shape, bfloat16, one H200"
    weights: float = 8.03e9
    layers: int = 32
    hidden: int = 4096
    """Query heads times their width."""
    kv_bytes_per_token: int = 131_072
    """2 (K, V) x 32 layers x 8 heads x 128 x 2 bytes."""
    compute_per_s: float = 0.5 * 989e12
    """FLOP/s: half of the data sheet's."""
    bandwidth_per_s: float = 4.8e12
    """bytes/s."""
    launch_s: float = 2e-3
    """Of an engine step, whatever it holds."""
    max_kv_tokens: int = 750_000
    """About 98 GB: 90 % of 141 GB without weights and activations."""

    def assumptions(self) -> str:
        """For whoever reads the figures."""
        return (f"ANALYTIC PROFILE, NOT MEASURED ({self.name}): {self.compute_per_s / 1e12:.1f} TFLOPS, {self.bandwidth_per_s / 1e12:.1f} "
                f"TB/s, {self.weights / 1e9:.2f}e9 weights of 2 bytes, {self.kv_bytes_per_token} bytes of KV per token, "
                f"{self.launch_s * 1e3:g} ms per step, {self.max_kv_tokens} KV tokens")

    def prefill_s(self, tokens: float) -> float:
        """Seconds to the first token of a prompt that is alone."""
        attention = 2.0 * self.layers * self.hidden * tokens * tokens  # QK and PV, causal: half of 4
        return self.launch_s + (2 * self.weights * tokens + attention) / self.compute_per_s

    def decode_s(self, kv_use: float, context: float) -> float:
        """Seconds of a decode step of at least one sequence."""
        tokens = max(kv_use * self.max_kv_tokens, context)
        weights = max(2 * self.weights / self.bandwidth_per_s, 2 * self.weights * tokens / context / self.compute_per_s)
        return self.launch_s + weights + tokens * self.kv_bytes_per_token / self.bandwidth_per_s

    def profile(self) -> Profile:
        """As a profiler would have found it, on one GPU."""
        isl = np.array(ISLS, dtype=np.float64)
        ttft = np.array([self.prefill_s(float(tokens)) for tokens in ISLS])
        return Profile(PrefillPoints(isl, ttft * 1e3, isl / ttft), self._decode_points())

    def _decode_points(self) -> DecodePoints:
        """At each context, KV uses from one sequence on."""
        grid = [(max(use, context / self.max_kv_tokens), float(context)) for context in CONTEXTS for use in KV_USES]
        use, context = np.array(sorted(set(grid))).T
        itl = np.array([self.decode_s(*point) for point in zip(use.tolist(), context.tolist(), strict=True)])
        return DecodePoints(use, context, itl * 1e3, use * self.max_kv_tokens / context / itl, float(self.max_kv_tokens))
