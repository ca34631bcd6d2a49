# SPDX-License-Identifier: Apache-2.0
"""What a worker on vllm-omni needs of its own and can be judged without it: its stages, and its outputs as tensors (docs/omni.md)."""
